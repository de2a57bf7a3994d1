import gzip
import json
import pickle
import random

import nmoe.data.readers
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from nmoe.data.errors import ArgumentError, SourceError
from nmoe.data.readers import TEXT_CUT, TEXT_LIMIT
from nmoe.data.sources import open_source

TEXTS = ["first", "second\nwith two lines", "żółw 🐢", " ", "x" * 100_000]


def jsonl(texts, key="text"):
    return "".join(json.dumps({"id": i, key: text}) + "\n" for i, text in enumerate(texts)).encode()


def write_parquet(path, texts, kind=None, column="text"):
    table = pa.table({"id": list(range(len(texts))), column: pa.array(texts, kind or pa.string())})
    pq.write_table(table, path, row_group_size=2)


def test_every_format_gives_the_same_documents(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(jsonl(TEXTS)))
    (tmp_path / "members.jsonl.gz").write_bytes(gzip.compress(jsonl(TEXTS[:2])) + gzip.compress(jsonl(TEXTS[2:])))
    (tmp_path / "b.jsonl.zst").write_bytes(zstd(jsonl(TEXTS)))
    kinds = [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]
    for number, kind in enumerate(kinds):
        write_parquet(tmp_path / f"c{number}.parquet", TEXTS, kind)
    for path in tmp_path.iterdir():
        files = open_source(None, [path])
        assert list(files) == TEXTS, path.name
        assert list(files) == TEXTS, "a second reading starts anew"
    assert pq.ParquetFile(tmp_path / "c0.parquet").num_row_groups == 3


def zstd(data):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def test_packed_text_is_the_same_text(tmp_path):
    text = "paragraph\n\n" * 20_000
    for name, data in (("a.txt", text.encode()), ("a.txt.gz", gzip.compress(text.encode())), ("a.md.zst", None)):
        (tmp_path / name).write_bytes(zstd(text.encode()) if data is None else data)
    readings = [list(open_source(None, [path])) for path in tmp_path.iterdir()]
    assert len(readings) == 3
    assert "".join(readings[0]) == text
    assert readings[0] == readings[1] == readings[2]


@pytest.fixture
def mixed_files(tmp_path):
    """Each kind of file, several blocks long when a block has 3,000 bytes; a document that is longer; blank lines."""
    draw = random.Random(0)
    texts = ["żółw 🐢 and text " * draw.randrange(1, 60) for _ in range(300)]
    texts[7] = "long " * 4000
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts[:150]) + b"\n\r\n" + jsonl(texts[150:]).rstrip())
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(jsonl(texts)))
    pq.write_table(pa.table({"text": texts[:90]}), tmp_path / "c.parquet", row_group_size=40)
    pq.write_table(pa.table({"text": texts[90:]}), tmp_path / "d.parquet")
    (tmp_path / "e.txt").write_bytes(b"\xef\xbb\xbf" + "\n\n".join(texts * 3).encode())
    (tmp_path / "f.txt.zst").write_bytes(zstd("\r\n \r\n".join(texts * 3).encode()))
    return tmp_path


def test_reading_goes_on_from_every_cut(mixed_files, monkeypatch):
    monkeypatch.setattr(nmoe.data.readers, "BLOCK_BYTES", 8000)
    monkeypatch.setattr(nmoe.data.readers, "_CHUNK", 1900)
    source = open_source(None, [mixed_files])
    cuts = list(source.blocks())
    parts = [list(cut.block.documents()) for cut in cuts]
    whole = [text for part in parts for text in part]
    assert len(cuts) > 60
    assert whole == list(source)
    assert [cut.read for cut in cuts] == sorted(cut.read for cut in cuts)
    assert cuts[-1].read == pytest.approx(source.total, rel=0.1)
    for number, cut in enumerate(cuts):
        position = json.loads(json.dumps(cut.after))
        rest = [text for later in source.blocks(position) for text in later.block.documents()]
        assert rest == [text for part in parts[number + 1 :] for text in part]


@pytest.mark.parametrize(("block", "chunk"), [(1, 1000), (4096, 4096), (1 << 20, 1 << 18)])
def test_documents_do_not_depend_on_blocks(mixed_files, monkeypatch, block, chunk):
    expected = list(open_source(None, [mixed_files]))
    monkeypatch.setattr(nmoe.data.readers, "BLOCK_BYTES", block)
    monkeypatch.setattr(nmoe.data.readers, "_CHUNK", chunk)
    source = open_source(None, [mixed_files])
    assert list(source) == expected
    for cut in source.blocks():
        assert list(pickle.loads(pickle.dumps(cut.block)).documents()) == list(cut.block.documents())


def test_blank_lines_of_any_length_across_chunks(tmp_path, monkeypatch):
    """Where a piece ends depends on the text, not on how it is read."""
    draw = random.Random(1)
    pieces = []
    for _ in range(60):
        pieces.append("x" * draw.randrange(1, 40_000))
        pieces.append("".join(draw.choice("\n\n \t\r") for _ in range(draw.randrange(2, 3000))))
    (tmp_path / "a.txt").write_bytes("".join(pieces).encode())
    readings = set()
    for chunk in (997, 4096, 1 << 16, 1 << 22):
        monkeypatch.setattr(nmoe.data.readers, "_CHUNK", chunk)
        readings.add(tuple(open_source(None, [tmp_path / "a.txt"])))
    assert len(readings) == 1


def test_globs_and_named_kinds(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c.json", ".d.jsonl"):
        (tmp_path / name).write_bytes(jsonl([name]))
    assert list(open_source(None, [tmp_path / "*.jsonl"])) == ["a.jsonl", "b.jsonl"]
    assert list(open_source("jsonl", [tmp_path / "*.js*"])) == ["a.jsonl", "b.jsonl", "c.json"]
    assert list(open_source("jsonl", [tmp_path / "c.json"])) == ["c.json"]
    assert list(open_source("text", [tmp_path / "c.json"])) == [jsonl(["c.json"]).decode()]
    assert list(open_source("jsonl", [tmp_path])) == ["a.jsonl", "b.jsonl"]
    for kind, path in ((None, "*.json"), (None, "c.json"), ("parquet", ""), (None, "*.parquet")):
        with pytest.raises(SourceError, match="expected"):
            open_source(kind, [tmp_path / path])


def test_globs_through_dots_and_hidden_folders(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / ".cache").mkdir()
    for name in ("a.jsonl", ".cache/b.jsonl"):
        (tmp_path / name).write_bytes(jsonl([name]))
    monkeypatch.chdir(tmp_path / "here")
    assert list(open_source(None, ["../*.jsonl"])) == ["a.jsonl"]
    assert list(open_source(None, ["../.cache/*.jsonl"])) == [".cache/b.jsonl"]
    assert list(open_source(None, [".."])) == ["a.jsonl"]


@pytest.mark.parametrize(("kind", "pattern"), [(None, "*"), ("parquet", "*.parquet"), (None, "**")])
def test_a_glob_that_matches_a_folder_of_parts_reads_each_part_once(tmp_path, kind, pattern):
    (tmp_path / "b.parquet").mkdir()
    for name in ("a.parquet", "b.parquet/part-0.parquet", "b.parquet/part-1.parquet"):
        write_parquet(tmp_path / name, [name])
    (tmp_path / "b.parquet" / "_SUCCESS").touch()
    found = ["a.parquet", "b.parquet/part-0.parquet", "b.parquet/part-1.parquet"]
    assert list(open_source(kind, [tmp_path / pattern])) == found


@pytest.mark.parametrize("path", ["", "*"])
def test_a_link_to_nowhere_is_named_and_not_left_out(tmp_path, path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(["a"]))
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "gone")
    with pytest.raises(SourceError, match=r"b\.jsonl.*a file that can be read"):
        open_source(None, [tmp_path / path])


@pytest.mark.parametrize(
    ("kind", "inputs", "options", "what"),
    [
        (None, [], {}, "input"),
        ("csv", ["a.csv"], {}, "source"),
        ("hf", ["a", "b"], {}, "input"),
        ("jsonl", ["a"], {"split": "test"}, "split"),
        (None, ["a"], {"revision": "main"}, "revision"),
        ("text", ["a"], {"config": "en"}, "config"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(kind, inputs, options, what):
    with pytest.raises(ArgumentError) as caught:
        open_source(kind, inputs, **options)
    assert caught.value.what == what


def test_identity_follows_the_files(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(["a"]))
    first = open_source(None, [tmp_path / "a.jsonl"]).identity()
    assert open_source(None, [tmp_path / "a.jsonl"]).identity() == first
    assert open_source(None, [tmp_path / "a.jsonl"], text_key="body").identity() != first
    (tmp_path / "a.jsonl").write_bytes(jsonl(["b"]))
    assert open_source(None, [tmp_path / "a.jsonl"]).identity() != first


def test_string_views_are_read_too(tmp_path):
    try:
        write_parquet(tmp_path / "view.parquet", TEXTS, pa.string_view())
    except pa.ArrowNotImplementedError:
        pytest.skip("this pyarrow cannot write string views")
    assert list(open_source(None, [tmp_path / "view.parquet"])) == TEXTS


def test_another_key(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS, key="content"))
    write_parquet(tmp_path / "a.parquet", TEXTS, column="content")
    for path in tmp_path.iterdir():
        assert list(open_source(None, [path], text_key="content")) == TEXTS


def test_blank_lines_and_empty_documents_are_skipped(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + jsonl(["a", ""]) + b"\n  \r\n" + jsonl(["b"]).rstrip())
    assert list(open_source(None, [path])) == ["a", "b"]


@pytest.mark.parametrize(
    ("bad", "found"),
    [
        (b'{"text": "cut', "no JSON"),
        (b'{"text": "\xff"}', "no JSON"),
        (b'["text"]', "a list"),
        (b'{"body": "x", "id": 1}', "'body', 'id'"),
        (b'{"text": null}', "NoneType"),
        (b'{"text": 7}', "int"),
        (b"[" * 100_000, "no JSON"),
    ],
)
@pytest.mark.parametrize("name", ["bad.jsonl", "bad.jsonl.gz"])
def test_a_bad_line_is_named(tmp_path, name, bad, found):
    path = tmp_path / name
    content = jsonl(["one", "two"]) + bad + b"\n" + jsonl(["four"])
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    documents = iter(open_source(None, [path]))
    assert [next(documents), next(documents)] == ["one", "two"]
    with pytest.raises(SourceError) as caught:
        next(documents)
    assert caught.value.what == f"{path}:3"
    assert found in caught.value.found
    assert "'text'" in caught.value.expected


@pytest.mark.parametrize("spoil", [lambda data: data[:-20], lambda data: b"no gzip" + data, lambda data: data[:60]])
def test_a_damaged_gzip_is_named(tmp_path, spoil):
    path = tmp_path / "cut.jsonl.gz"
    path.write_bytes(spoil(gzip.compress(jsonl([str(i) * 50 for i in range(1000)]))))
    with pytest.raises(SourceError, match=r"cut\.jsonl\.gz:\d+"):
        list(open_source(None, [path]))


def test_parquet_faults_are_named(tmp_path):
    write_parquet(tmp_path / "null.parquet", ["a", "b", None])
    with pytest.raises(SourceError, match=r"null\.parquet, row 2"):
        list(open_source(None, [tmp_path / "null.parquet"]))
    values, offsets = pa.py_buffer(b"ab\xff"), pa.py_buffer(np.arange(4, dtype=np.int32))
    table = pa.table({"text": pa.Array.from_buffers(pa.string(), 3, [None, offsets, values])})
    pq.write_table(table, tmp_path / "latin.parquet")
    with pytest.raises(SourceError, match=r"latin\.parquet, row 2: expected text, found bytes that are no UTF-8"):
        list(open_source(None, [tmp_path / "latin.parquet"]))
    write_parquet(tmp_path / "column.parquet", ["a"], column="body")
    with pytest.raises(SourceError, match=r"column\.parquet.*'id', 'body'"):
        list(open_source(None, [tmp_path / "column.parquet"]))
    with pytest.raises(SourceError, match=r"'id' of type int64"):
        list(open_source(None, [tmp_path / "column.parquet"], text_key="id"))
    whole = (tmp_path / "null.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SourceError, match=r"cut\.parquet"):
        list(open_source(None, [tmp_path / "cut.parquet"]))


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_long_text_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path, newline):
    paragraphs = [f"{i} żółw " * (i % 40 + 1) + newline * (i % 3 + 2) for i in range(3000)]
    text = "".join(paragraphs)
    path = tmp_path / "book.txt"
    path.write_bytes(text.encode())
    pieces = list(open_source(None, [path]))
    assert "".join(pieces) == text
    assert len(pieces) > 3
    assert all(TEXT_CUT <= len(piece) < TEXT_CUT + 1000 for piece in pieces[:-1])
    assert all(piece.endswith(newline * 2) and not piece[0].isspace() for piece in pieces[:-1])


def test_blank_lines_at_a_border_of_reading_stay_together(tmp_path):
    pieces = ["x" * (2 * TEXT_CUT - 2) + "\n\n\n\n", "y\n\n"]
    (tmp_path / "book.txt").write_text("".join(pieces))
    assert list(open_source(None, [tmp_path / "book.txt"])) == pieces


def test_a_short_text_is_one_document(tmp_path):
    (tmp_path / "note.md").write_bytes(b"\xef\xbb\xbf# Title\r\n\r\nBody\n")
    assert list(open_source(None, [tmp_path / "note.md"])) == ["# Title\r\n\r\nBody\n"]
    (tmp_path / "empty.txt").write_bytes(b"")
    assert list(open_source(None, [tmp_path / "empty.txt"])) == []


def test_a_text_without_blank_lines_is_cut_all_the_same(tmp_path):
    text = "word " * 600_000
    (tmp_path / "wall.txt").write_text(text)
    pieces = list(open_source(None, [tmp_path / "wall.txt"]))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) == TEXT_LIMIT


@pytest.mark.parametrize("position", [10, TEXT_CUT - 1, TEXT_CUT, 3 * TEXT_CUT + 5])
def test_text_that_is_not_utf8_is_named_with_its_position(tmp_path, position):
    # Two-byte letters from an odd position on: chunk borders fall inside of them.
    data = bytearray(b"x" + "é".encode() * (2 * TEXT_CUT))
    data[position] = 0xFF
    (tmp_path / "latin.txt").write_bytes(data)
    with pytest.raises(SourceError, match=r"latin\.txt") as caught:
        list(open_source(None, [tmp_path / "latin.txt"]))
    # The bad byte itself, or the letter that it broke.
    assert int(caught.value.found.rsplit(" ", 1)[1]) in (position, position - 1)


def test_a_folder_stands_for_its_files_in_order(tmp_path):
    for name in ("b/2.txt", "b/10.txt", "a.jsonl", ".hidden/x.txt", "b/.y.txt", "b/image.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(jsonl([name]) if name.endswith("jsonl") else name.encode())
    assert list(open_source(None, [tmp_path])) == ["a.jsonl", "b/10.txt", "b/2.txt"]
    assert list(open_source(None, [tmp_path / "b" / "2.txt", tmp_path / "a.jsonl"])) == ["b/2.txt", "a.jsonl"]
    assert open_source(None, [tmp_path]).describe()["first"] == ["a.jsonl", "10.txt", "2.txt"]


def test_paths_are_checked_before_anything_is_read(tmp_path):
    (tmp_path / "picture.png").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    for name in ("missing.txt", "picture.png", "folder"):
        with pytest.raises(SourceError, match=name):
            open_source(None, [tmp_path / name])


def test_a_file_that_vanishes_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    files = open_source(None, [tmp_path / "a.txt"])
    (tmp_path / "a.txt").unlink()
    with pytest.raises(SourceError, match=r"a\.txt"):
        list(files)


def test_real_text(shared_text):
    files = open_source(None, [shared_text / "peps.jsonl.gz"])
    assert sum(1 for _ in files) == 630
    assert sum(len(text) for text in files) == pytest.approx(11.4e6, rel=0.01)
