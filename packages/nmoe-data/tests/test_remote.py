"""Reading over HTTP, from a server on the loopback address that fails as servers do."""

import gzip
import io
import json

import nmoe.data.readers
import nmoe.data.remote
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from nmoe.data.errors import NetworkError, SourceChangedError, SourceError
from nmoe.data.remote import RETRIES, Patience, RemoteFile
from nmoe.data.sources import open_source

TEXTS = [f"document {number} " + "with words " * (number % 50) for number in range(2000)]


class Told:
    """Patience without the waiting."""

    def __init__(self):
        self.notices, self.pauses = [], []
        self.patience = Patience(self.notices.append, self.pauses.append)


@pytest.fixture
def told():
    return Told()


@pytest.fixture
def site(web):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    sink = io.BytesIO()
    pq.write_table(pa.table({"id": range(len(TEXTS)), "text": TEXTS}), sink, row_group_size=300)
    web.files = {
        "/data/a.jsonl": lines,
        "/data/a.jsonl.gz": gzip.compress(lines),
        "/data/a.parquet": sink.getvalue(),
        "/data/a.txt": "\n".join(TEXTS).encode(),
        "/data/": b'<a href="a.jsonl">x</a> <a href="/data/a.jsonl.gz">x</a> <a href="../b.jsonl">x</a> <a>no</a>',
    }
    return web


FILES = ["a.jsonl", "a.jsonl.gz", "a.parquet"]


@pytest.mark.parametrize("name", FILES)
def test_files_give_their_documents(site, told, name):
    source = open_source(None, [f"{site.url}/data/{name}?version=2"], patience=told.patience)
    assert list(source) == TEXTS
    assert source.total == len(site.files[f"/data/{name}"])
    assert source.describe()["first"] == [name]
    assert told.notices == []


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("fault", [500, 503, 429, ("cut", 0), ("cut", 3000), ("reset", 0), ("reset", 3000)])
def test_trouble_is_told_waited_out_and_changes_nothing(site, told, name, fault):
    source = open_source(None, [f"{site.url}/data/{name}"], patience=told.patience)
    site.faults = [fault, fault, None, fault]
    assert list(source) == TEXTS
    assert len(told.notices) >= 2
    assert told.pauses[:2] in ([1.0, 2.0], [1.0, 1.0])  # a byte gained in between starts the count anew
    assert all(name in notice and f"of {RETRIES} follows in" in notice for notice in told.notices)


def test_a_file_that_breaks_at_every_turn_still_arrives_without_rereading(site, told):
    source = open_source(None, [f"{site.url}/data/a.jsonl"], patience=told.patience)
    site.requests.clear()
    size = len(site.files["/data/a.jsonl"])
    site.faults = [("cut", size // 20)] * 19
    assert list(source) == TEXTS
    starts = [int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0 for _, asked in site.requests]
    assert starts == sorted(set(starts))
    assert set(told.pauses) == {1.0}


@pytest.mark.parametrize("fault", [500, ("cut", 0), ("reset", 0)])
def test_patience_ends_with_a_remedy(site, told, fault):
    source = open_source(None, [f"{site.url}/data/a.jsonl"], patience=told.patience)
    site.faults = [fault] * 100
    with pytest.raises(NetworkError, match=r"a\.jsonl.*Run the same command again"):
        list(source)
    assert told.pauses == [1.0, 2.0, 4.0, 8.0, 16.0]


def test_patience_ends_when_the_same_byte_never_comes(site, told):
    """Every answer breaks off at the same place."""
    source = open_source(None, [f"{site.url}/data/a.jsonl"], patience=told.patience)
    site.faults = [("cut", 5000), *[("cut", 0)] * 100]
    with pytest.raises(NetworkError, match="byte 5000 of"):
        list(source)
    assert len(told.pauses) == RETRIES


def test_nobody_there(told):
    with pytest.raises(NetworkError, match="refused"):
        open_source(None, ["http://127.0.0.1:9/a.jsonl"], patience=told.patience)
    assert len(told.notices) == RETRIES


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_a_refusal_is_no_trouble(site, told, status):
    site.faults = [status]
    with pytest.raises(SourceError, match=f"HTTP status {status}") as caught:
        open_source(None, [f"{site.url}/data/a.jsonl"], patience=told.patience)
    assert not isinstance(caught.value, NetworkError)
    assert told.notices == []


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_a_server_without_ranges_is_read_all_the_same(site, told, monkeypatch, name):
    monkeypatch.setattr(nmoe.data.readers, "BLOCK_BYTES", 10_000)
    monkeypatch.setattr(nmoe.data.readers, "_CHUNK", 5000)
    source = open_source(None, [f"{site.url}/data/{name}"], patience=told.patience)
    whole = list(source)
    site.ranges = False
    site.faults = [("cut", 20_000)]
    assert list(source) == whole
    cut = list(source.blocks())[3 if name == "a.jsonl" else 0]
    rest = [text for later in source.blocks(cut.after) for text in later.block.documents()]
    assert rest == whole[-len(rest) :] if rest else len(whole) == 1


def test_a_file_that_is_replaced_meanwhile_is_noticed(site, told):
    source = open_source(None, [f"{site.url}/data/a.jsonl"], patience=told.patience)
    site.faults = [("cut", 5000)]
    blocks = RemoteFile(f"{site.url}/data/a.jsonl", told.patience)
    assert len(io.BufferedReader(blocks, 100).read(4000)) == 4000
    site.files["/data/a.jsonl"] = site.files["/data/a.jsonl"].replace(b"words", b"lords")
    with pytest.raises(SourceChangedError, match=r"a\.jsonl"):
        blocks.readall()
    fresh = open_source(None, [f"{site.url}/data/a.jsonl"], patience=told.patience)
    assert fresh.identity() != source.identity()


def test_reading_goes_on_with_a_range(site, told, monkeypatch):
    monkeypatch.setattr(nmoe.data.remote, "_SKIP", 1000)
    monkeypatch.setattr(nmoe.data.readers, "BLOCK_BYTES", 10_000)
    monkeypatch.setattr(nmoe.data.readers, "_CHUNK", 5000)
    source = open_source(None, [f"{site.url}/data/a.jsonl"], patience=told.patience)
    cuts = list(source.blocks())
    after = cuts[len(cuts) // 2].after
    site.requests.clear()
    rest = [text for later in source.blocks(after) for text in later.block.documents()]
    assert rest == TEXTS[-len(rest) :]
    assert site.requests[-1] == ("/data/a.jsonl", f"bytes={after['within']['offset']}-")


def test_parquet_reads_the_columns_that_it_needs(site, told):
    texts = [str(number) * 50 for number in range(30_000)]
    sink = io.BytesIO()
    table = pa.table({"pad": [text[::-1] + "pad" * 20 for text in texts], "text": texts})
    pq.write_table(table, sink, compression="none", use_dictionary=False)
    site.files["/data/wide.parquet"] = sink.getvalue()
    source = open_source(None, [f"{site.url}/data/wide.parquet"], patience=told.patience)
    site.requests.clear()
    assert list(source) == texts
    assert len(site.requests) < 10


def test_a_pattern_is_looked_up_in_the_index_page(site, told):
    source = open_source(None, [f"{site.url}/data/*.jsonl*"], patience=told.patience)
    assert [file.name for file in source.files] == [f"{site.url}/data/a.jsonl", f"{site.url}/data/a.jsonl.gz"]
    assert list(source) == TEXTS * 2
    with pytest.raises(SourceError, match="none among"):
        open_source(None, [f"{site.url}/data/*.parquet"], patience=told.patience)
