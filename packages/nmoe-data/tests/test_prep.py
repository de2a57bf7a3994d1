import gzip
import json
import math
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
import tracemalloc
from fractions import Fraction
from pathlib import Path

import nmoe.data.prep
import numpy as np
import pytest
from nmoe.data.errors import (
    ArgumentError,
    EmptySourceError,
    OutputExistsError,
    PrepRunningError,
    PrepStateError,
    SourceError,
    TokenRangeError,
    WriteError,
)
from nmoe.data.prep import _is_validation, gzip_bits_per_byte, prepare, prepare_documents
from nmoe.data.prep_state import partial_folder
from nmoe.data.shards import ShardSet
from nmoe.data.sources import open_source
from nmoe.data.tokenizers import ByteTokenizer, load_tokenizer


def texts_of(shards, tokenizer):
    return [tokenizer.decode(shards.document(number)) for number in range(shards.n_documents)]


def make_texts(count, seed=0):
    draw = random.Random(seed)
    return [f"document {i}: " + "żółw and tortoise " * draw.randrange(1, 9) for i in range(count)]


def content(folder):
    """Every byte below a folder, by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("count", "fraction"), [(100, 0.1), (101, 0.1), (78, 0.1), (5, 0.01), (2, 0.5), (7, 0), (50, 0.3), (30, 0.9)]
)
def test_validation_is_spread_evenly(tmp_path, tiktoken_file, texts_source, count, fraction):
    texts, tokenizer = make_texts(count), load_tokenizer(str(tiktoken_file))
    result = prepare(texts_source(texts), tokenizer, tmp_path / "out", val_fraction=fraction, shard_tokens=300)
    part = Fraction(str(fraction))
    val = [i for i in range(count) if math.floor(i * part) != math.floor((i - 1) * part)]
    assert texts_of(result.train, tokenizer) == [texts[i] for i in range(count) if i not in val]
    assert result.train.n_bytes == sum(len(texts[i].encode()) for i in range(count) if i not in val)
    assert sorted(os.listdir(tmp_path / "out")) == (["train", "val"] if val else ["train"])
    assert len(val) == math.ceil(count * part)
    if val:
        assert val[0] == 0
        assert texts_of(result.val, tokenizer) == [texts[i] for i in val]
        assert result.val.n_bytes == sum(len(texts[i].encode()) for i in val)
    else:
        assert result.val is None
    assert sorted(os.listdir(tmp_path)) == ["out"]


@pytest.mark.parametrize("fraction", ["0", "1/10", "3/7", "999999999/1000000000", "1/1000000000"])
def test_the_choice_is_the_same_however_documents_are_grouped(fraction):
    part = Fraction(fraction)
    for first in (0, 1, 9, 10**12 + 7, 10**17):
        whole = _is_validation(first, 40, part)
        assert whole.tolist() == [math.floor(i * part) != math.floor((i - 1) * part) for i in range(first, first + 40)]
        single = [_is_validation(first + i, 1, part)[0] for i in range(40)]
        assert whole.tolist() == single
        assert _is_validation(first, 0, part).size == 0


def test_the_output_does_not_depend_on_blocks_or_workers(tmp_path, texts_source):
    texts = make_texts(200)
    made = []
    for number, (size, workers) in enumerate([(1, 1), (3, 1), (500, 1), (7, 2), (7, 3)]):
        output = tmp_path / str(number)
        prepare(texts_source(texts, size), ByteTokenizer(), output, workers=workers, shard_tokens=2000, dedupe=True)
        made.append(content(output))
    assert len(made[0]) > 10
    assert all(other == made[0] for other in made)


def test_every_document_ends_with_eos(tmp_path, tiktoken_file, texts_source):
    texts, tokenizer = make_texts(20), load_tokenizer(str(tiktoken_file))
    shards = prepare(texts_source(texts), tokenizer, tmp_path / "out", val_fraction=0).train
    everything = [token for text in texts for token in [*tokenizer.encode(text), tokenizer.eos_id]]
    assert shards.tokens(0, shards.n_tokens).tolist() == everything


def test_files_end_to_end(tmp_path):
    (tmp_path / "book.txt").write_text("\n\n".join(f"paragraph {i} " * 50 for i in range(1000)))
    files = open_source(None, [tmp_path / "book.txt"])
    result = prepare(files, ByteTokenizer(), tmp_path / "out", val_fraction=0.2)
    documents = list(files)
    assert texts_of(result.val, ByteTokenizer()) == documents[::5]
    assert sorted(texts_of(result.train, ByteTokenizer()) + documents[::5]) == sorted(documents)
    source = result.train.manifest.source
    assert source["kind"] == "text"
    assert source["first"] == ["book.txt"]
    assert source["bytes"] == (tmp_path / "book.txt").stat().st_size
    assert source["prep"] == {"val_fraction": 0.2, "max_tokens": None, "duplicates": None}
    assert str(tmp_path) not in (tmp_path / "out" / "train" / "manifest.json").read_text()


@pytest.mark.parametrize("max_tokens", [1, 500, 501, 2000, 10**9])
@pytest.mark.parametrize("size", [1, 10, 1000])
def test_max_tokens_ends_after_the_document_that_reaches_them(tmp_path, texts_source, max_tokens, size):
    texts = make_texts(60)
    lengths = [len(text.encode()) + 1 for text in texts]
    reached = [i for i in range(60) if sum(lengths[: i + 1]) >= max_tokens]
    count = reached[0] + 1 if reached else 60
    if count < 2:
        with pytest.raises(EmptySourceError):
            prepare(texts_source(texts, size), ByteTokenizer(), tmp_path / "out", max_tokens=max_tokens)
        return
    result = prepare(texts_source(texts, size), ByteTokenizer(), tmp_path / "out", max_tokens=max_tokens)
    assert result.train.n_tokens + result.val.n_tokens == sum(lengths[:count])
    assert result.train.manifest.source["prep"]["max_tokens"] == max_tokens


def test_equal_documents_are_kept_once(tmp_path, texts_source):
    draw = random.Random(3)
    texts = [f"text {draw.randrange(100)}" for _ in range(400)]
    once = list(dict.fromkeys(texts))
    result = prepare(texts_source(texts), ByteTokenizer(), tmp_path / "out", dedupe=True, val_fraction=0.25)
    assert result.duplicates == 400 - len(once)
    assert result.val.manifest.source["prep"]["duplicates"] == result.duplicates
    assert texts_of(result.val, ByteTokenizer()) == once[::4], "numbered after deduplication"
    plain = prepare(texts_source(once), ByteTokenizer(), tmp_path / "plain", val_fraction=0.25)
    assert (plain.train.fingerprint, plain.val.fingerprint) == (result.train.fingerprint, result.val.fingerprint)


def test_the_count_of_duplicates_ends_with_the_last_document(tmp_path, texts_source):
    """Where a block ends depends on interruptions: the manifest must not."""
    texts = ["a" * 9, "a" * 9, "b" * 9, "b" * 9, "c" * 9, "b" * 9, "c" * 9]
    made = []
    for size in (1, 3, 4, 7):
        output = tmp_path / str(size)
        prepare(texts_source(texts, size), ByteTokenizer(), output, dedupe=True, max_tokens=15, val_fraction=0)
        made.append(content(output))
    assert json.loads(made[0]["train/manifest.json"])["source"]["prep"]["duplicates"] == 1
    assert all(other == made[0] for other in made)


def test_memory_does_not_grow_with_the_text(tmp_path, texts_source):
    class Many(texts_source):
        def blocks(self, start=None):
            for number in range(self.size):
                block = nmoe.data.blocks.TextBlock(["0123456789" * 1000 + f"{number} {i}" for i in range(20)])
                yield nmoe.data.blocks.Cut(block, {"at": number}, 0)

    peaks = []
    for count in (20, 200):
        tracemalloc.start()
        source = Many([], count)
        prepare(source, ByteTokenizer(), tmp_path / str(count), val_fraction=0.01, shard_tokens=10**6, dedupe=True)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # 4 and 40 MB of text, 16 and 160 MB of tokens.
    assert peaks[1] < 1.2 * peaks[0] + 2**20


def test_nothing_is_overwritten(tmp_path, texts_source):
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputExistsError, match="out"):
        prepare(texts_source(make_texts(5)), ByteTokenizer(), tmp_path / "out")
    (tmp_path / "file").write_text("precious")
    with pytest.raises(OutputExistsError):
        prepare(texts_source(make_texts(5)), ByteTokenizer(), tmp_path / "file")
    with pytest.raises(WriteError, match="Choose another output"):
        prepare(texts_source(make_texts(5)), ByteTokenizer(), tmp_path / "file" / "out")
    assert (tmp_path / "file").read_text() == "precious"
    assert sorted(os.listdir(tmp_path)) == ["file", "out"]


@pytest.mark.parametrize("output", [".", "..", "/"])
def test_a_folder_without_a_name_is_there_already(tmp_path, monkeypatch, texts_source, output):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputExistsError, match="choose another output"):
        prepare(texts_source(make_texts(5)), ByteTokenizer(), Path(output))
    assert os.listdir(tmp_path) == []


def test_an_output_that_appears_meanwhile_is_kept(tmp_path, texts_source):
    def appear(now):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "precious").write_text("x")

    with pytest.raises(OutputExistsError):
        prepare(texts_source(make_texts(5)), ByteTokenizer(), tmp_path / "out", progress=appear)
    assert os.listdir(tmp_path / "out") == ["precious"]


ERRORS = [SourceError("x", expected="a", found="b", remedy="c"), KeyboardInterrupt(), RuntimeError("bug")]


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_before_any_document_leaves_nothing(tmp_path, texts_source, error, workers):
    open_files = len(os.listdir("/dev/fd"))
    source = texts_source(make_texts(50), fail_at=0, error=error)
    with pytest.raises(type(error)):
        prepare(source, ByteTokenizer(), tmp_path / "out", workers=workers)
    assert os.listdir(tmp_path) == []
    assert len(os.listdir("/dev/fd")) == open_files


@pytest.mark.parametrize(
    ("workers", "dedupe", "error"),
    [*((1, dedupe, error) for dedupe in (False, True) for error in ERRORS), (2, True, ERRORS[0])],
)
def test_an_error_keeps_the_work_so_far(tmp_path, texts_source, error, workers, dedupe):
    """Stopped again and again, a block further each time, it ends with the bytes of one that was not."""
    texts = make_texts(60) + make_texts(30)
    options = {"shard_tokens": 1500, "dedupe": dedupe}
    prepare(texts_source(texts), ByteTokenizer(), tmp_path / "whole", **options)
    notices, documents = [], []
    while not (tmp_path / "out").exists():
        # In one process a block is written before the next is read, and so a block is gained at each stop.
        source = texts_source(texts, fail_at=1 + len(documents) % 3, error=error)
        try:
            prepare(
                source,
                ByteTokenizer(),
                tmp_path / "out",
                workers=workers,
                notice=notices.append,
                progress=lambda now: documents.append(now.documents),
                **options,
            )
        except type(error):
            assert (tmp_path / "out.partial").is_dir()
            assert len(notices) < 20
    assert len(notices) >= 4
    assert all("Going on in" in notice for notice in notices)
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert sorted(os.listdir(tmp_path)) == ["out", "whole"]


def stop_midway(tmp_path, texts_source, texts, **options):
    source = texts_source(texts, fail_at=4, error=KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        prepare(source, ByteTokenizer(), tmp_path / "out", **options)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"val_fraction": 0.2}, "val_fraction"),
        ({"shard_tokens": 10}, "shard_tokens"),
        ({"max_tokens": 10}, "max_tokens"),
        ({"dedupe": True}, "dedupe"),
        ({"label": "other"}, "source's label"),
        ({"tokenizer": True}, "tokenizer"),
    ],
)
def test_other_settings_are_refused_by_name(tmp_path, texts_source, tiktoken_file, change, names):
    texts = make_texts(60)
    stop_midway(tmp_path, texts_source, texts)
    before = content(tmp_path / "out.partial")
    tokenizer = load_tokenizer(str(tiktoken_file)) if change.pop("tokenizer", False) else ByteTokenizer()
    source = texts_source(texts, label=change.pop("label", "texts"))
    with pytest.raises(PrepStateError, match=f"{names} that this unfinished prep was begun with"):
        prepare(source, tokenizer, tmp_path / "out", **change)
    assert content(tmp_path / "out.partial") == before
    assert prepare(texts_source(texts), ByteTokenizer(), tmp_path / "out", workers=2).train.n_documents == 54


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"version": 2}', '{"version": 1, "settings": {}}', "[" * 10**5])
def test_a_state_that_makes_no_sense_is_refused(tmp_path, texts_source, text):
    stop_midway(tmp_path, texts_source, make_texts(60))
    (tmp_path / "out.partial" / "progress.json").write_text(text)
    with pytest.raises(PrepStateError, match=r"progress\.json.*Delete"):
        prepare(texts_source(make_texts(60)), ByteTokenizer(), tmp_path / "out")


@pytest.mark.parametrize("fault", ["missing", "damaged"])
def test_a_damaged_file_of_seen_documents_is_refused(tmp_path, texts_source, fault):
    stop_midway(tmp_path, texts_source, make_texts(60), dedupe=True)
    seen = tmp_path / "out.partial" / "seen.db"
    seen.unlink()
    if fault == "damaged":
        seen.write_bytes(b"no database" * 1000)
    with pytest.raises(PrepStateError, match=r"seen\.db.*Delete"):
        prepare(texts_source(make_texts(60)), ByteTokenizer(), tmp_path / "out", dedupe=True)


def test_a_disk_that_is_full_for_the_seen_documents_is_told(tmp_path, monkeypatch, texts_source):
    connect = sqlite3.connect

    def small(*arguments, **options):
        connection = connect(*arguments, **options)
        connection.execute("PRAGMA max_page_count = 8")
        return connection

    monkeypatch.setattr(sqlite3, "connect", small)
    texts = make_texts(3000) + make_texts(3000)
    monkeypatch.setattr(nmoe.data.prep, "SAVE_GAP_S", 0)
    with pytest.raises(WriteError, match=r"seen\.db.*full.*run the same command again"):
        prepare(texts_source(texts, 400), ByteTokenizer(), tmp_path / "out", dedupe=True)
    monkeypatch.setattr(sqlite3, "connect", connect)
    notices = []
    prepare(texts_source(texts, 400), ByteTokenizer(), tmp_path / "out", dedupe=True, notice=notices.append)
    assert len(notices) == 1
    prepare(texts_source(texts, 400), ByteTokenizer(), tmp_path / "whole", dedupe=True)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.parametrize("fault", ["missing", "truncated"])
@pytest.mark.parametrize("name", ["shard_00000.npy", "shard_00000.idx"])
@pytest.mark.parametrize("shard_tokens", [1500, 10**6])
def test_unfinished_shards_that_were_altered_are_refused(tmp_path, texts_source, fault, name, shard_tokens):
    """The closed ones as well as the open one."""
    texts = make_texts(60)
    stop_midway(tmp_path, texts_source, texts, shard_tokens=shard_tokens)
    path = tmp_path / "out.partial" / "data" / "train" / name
    data = path.read_bytes()
    path.unlink()
    if fault == "truncated":
        path.write_bytes(data[:-1])
    with pytest.raises(PrepStateError, match=f"{name}.*start"):
        prepare(texts_source(texts), ByteTokenizer(), tmp_path / "out", shard_tokens=shard_tokens)


def test_two_at_once_are_refused(tmp_path, texts_source):
    with partial_folder(tmp_path / "out"):
        with pytest.raises(PrepRunningError, match=r"out\.partial"):
            prepare(texts_source(make_texts(5)), ByteTokenizer(), tmp_path / "out")
    prepare(texts_source(make_texts(5)), ByteTokenizer(), tmp_path / "out")


def test_a_folder_that_another_process_removes_meanwhile_is_made_anew(tmp_path, monkeypatch, texts_source):
    opened = []

    def late(path, mode):
        if not opened:
            path.parent.rmdir()
        opened.append(path)
        return open(path, mode)

    monkeypatch.setattr(nmoe.data.prep_state, "open", late, raising=False)
    prepare(texts_source(make_texts(5)), ByteTokenizer(), tmp_path / "out")
    assert len(opened) == 2


def test_a_full_disk_is_told_and_work_goes_on_later(tmp_path, monkeypatch, texts_source):
    texts = make_texts(100)
    prepare(texts_source(texts), ByteTokenizer(), tmp_path / "whole", shard_tokens=1000)
    calls, sync = [], os.fsync

    def full(handle):
        calls.append(handle)
        if len(calls) > 12:
            raise OSError(28, "No space left on device")
        sync(handle)

    monkeypatch.setattr(nmoe.data.prep, "SAVE_GAP_S", 0)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WriteError, match=r"No space left.*run the same command again"):
        prepare(texts_source(texts), ByteTokenizer(), tmp_path / "out", shard_tokens=1000)
    monkeypatch.setattr(os, "fsync", sync)
    notices = []
    prepare(texts_source(texts), ByteTokenizer(), tmp_path / "out", shard_tokens=1000, notice=notices.append)
    assert len(notices) == 1
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.parametrize(
    ("texts", "fraction"), [([], 0), ([], 0.1), (["one"], 0.1), (["", ""], 0.5), (["", "one"], 0.5)]
)
def test_too_little_text_is_refused_and_leaves_nothing(tmp_path, texts_source, texts, fraction):
    with pytest.raises(EmptySourceError):
        prepare(texts_source(texts), ByteTokenizer(), tmp_path / "out", val_fraction=fraction)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("val_fraction", 1),
        ("val_fraction", -0.1),
        ("val_fraction", float("nan")),
        ("val_fraction", 1e-12),
        ("shard_tokens", 0),
        ("max_tokens", 0),
        ("workers", 0),
    ],
)
def test_impossible_arguments_are_refused(tmp_path, texts_source, name, value):
    with pytest.raises(ArgumentError, match=name):
        prepare(texts_source(["a", "b"]), ByteTokenizer(), tmp_path / "out", **{name: value})


def test_a_tokenizer_that_breaks_its_word_is_refused(tmp_path, texts_source):
    class Broken(ByteTokenizer):
        def encode_batch(self, texts):
            return [np.array([257], np.uint32) for _ in texts]

    with pytest.raises(TokenRangeError, match="257"):
        prepare(texts_source(["a", "b"]), Broken(), tmp_path / "out", val_fraction=0)


def test_progress_is_told(tmp_path, texts_source):
    told, texts = [], ["abc", "abc", "", "de"]
    prepare(texts_source(texts, 2), ByteTokenizer(), tmp_path / "out", dedupe=True, progress=told.append)
    assert [(now.documents, now.tokens, now.text_bytes, now.duplicates, now.read, now.total) for now in told] == [
        (0, 0, 0, 0, 0, 4),
        (1, 4, 3, 1, 2, 4),
        (2, 7, 5, 1, 4, 4),
    ]


def test_gzip_is_measured_on_the_text(tmp_path, texts_source, monkeypatch):
    tokenizer, texts = ByteTokenizer(), make_texts(300)
    result = prepare(texts_source(texts), tokenizer, tmp_path / "out", val_fraction=0.3)
    for shards in (result.train, result.val):
        text = "".join(texts_of(shards, tokenizer)).encode()
        expected = 8 * len(gzip.compress(text, 9)) / len(text)
        assert gzip_bits_per_byte(shards, tokenizer) == pytest.approx(expected, abs=1e-3)
    assert result.val.manifest.gzip_bits_per_byte == gzip_bits_per_byte(result.val, tokenizer)
    # In parts, up to a limit, the same for any number of threads.
    monkeypatch.setattr(nmoe.data.prep, "GZIP_PART", 1000)
    monkeypatch.setattr(nmoe.data.prep, "GZIP_LIMIT", 3000)
    text = "".join(texts_of(result.train, tokenizer)).encode()[:3000]
    expected = 8 * sum(len(gzip.compress(text[start : start + 1000], 9)) for start in (0, 1000, 2000)) / 3000
    for workers in (1, 2, 5):
        assert gzip_bits_per_byte(result.train, tokenizer, workers) == pytest.approx(expected)


def test_explicit_documents_are_taken_as_they_are(tmp_path):
    sets = {"train": ["a", "", "b"], "val": ["c"]}
    result = prepare_documents(sets, ByteTokenizer(), tmp_path / "out", source={"kind": "mine"})
    assert texts_of(result.train, ByteTokenizer()) == ["a", "", "b"]
    assert texts_of(result.val, ByteTokenizer()) == ["c"]
    assert result.val.manifest.gzip_bits_per_byte is not None
    assert prepare_documents({"train": ["a"]}, ByteTokenizer(), tmp_path / "one", source={}).val is None
    for empty in ({"train": [], "val": ["a"]}, {"train": ["a"], "val": [""]}):
        with pytest.raises(EmptySourceError):
            prepare_documents(empty, ByteTokenizer(), tmp_path / "none", source={})
    assert sorted(os.listdir(tmp_path)) == ["one", "out"]


SLOW_PREP = """
import sys
from pathlib import Path
import nmoe.data.prep
from nmoe.data import load_tokenizer, open_source, prepare

nmoe.data.prep.SAVE_GAP_S = 0.02
workers = int(sys.argv[3])
source = open_source(None, [sys.argv[1]])
prepare(source, load_tokenizer("byte"), Path(sys.argv[2]), workers=workers, shard_tokens=700_000, dedupe=True)
"""


def changed_at(path: Path) -> int | None:
    """In ns; None while there is no such file, which may go at any moment."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


@pytest.mark.parametrize("kills", [8, pytest.param(100, marks=pytest.mark.soak)])
def test_killed_anywhere_it_ends_with_the_same_bytes(tmp_path, kills):
    """SIGKILL to the whole process group at random moments, with another number of workers each time."""
    draw = random.Random(kills)
    texts = [f"document {i} " * draw.randrange(1, 4000) for i in range(400)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, *texts[::3]]))
    source = open_source(None, [tmp_path / "texts.jsonl"])
    prepare(source, ByteTokenizer(), tmp_path / "whole", shard_tokens=700_000, dedupe=True)
    left = []
    for _ in range(kills):
        arguments = [str(tmp_path / "texts.jsonl"), str(tmp_path / "out"), draw.choice("1123")]
        process = subprocess.Popen([sys.executable, "-c", SLOW_PREP, *arguments], start_new_session=True)
        progress = tmp_path / "out.partial" / "progress.json"
        before = changed_at(progress)
        # Until there is something new, or it ended.
        while process.poll() is None and changed_at(progress) in (None, before):
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.15))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if (tmp_path / "out").exists():
            break
        left.append(json.loads(progress.read_text())["state"]["progress"]["documents"])
    assert left == sorted(left)
    assert len(left) >= 2
    if not (tmp_path / "out").exists():
        prepare(source, ByteTokenizer(), tmp_path / "out", shard_tokens=700_000, dedupe=True)
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    ShardSet.open(tmp_path / "out" / "train", verify="checksums")


def test_a_kill_at_every_step_of_the_end(tmp_path, texts_source, monkeypatch):
    """Between the last block and the final name: each call that changes the disk is the last one once."""
    texts = make_texts(40)
    prepare(texts_source(texts), ByteTokenizer(), tmp_path / "whole", shard_tokens=1500)

    class Killed(BaseException):
        pass

    real = {name: getattr(os, name) for name in ("fsync", "replace", "rename", "unlink", "rmdir")}
    for last in range(1, 200):
        calls = 0

        def counted(name, most=last):
            def call(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls > most:
                    raise Killed
                return real[name](*args, **kwargs)

            return call

        with monkeypatch.context() as patched:
            for name in real:
                patched.setattr(os, name, counted(name))
            try:
                prepare(texts_source(texts, 100), ByteTokenizer(), tmp_path / "out", shard_tokens=1500)
                finished = True
            except Killed:
                finished = False
        if not (tmp_path / "out").exists():
            prepare(texts_source(texts, 100), ByteTokenizer(), tmp_path / "out", shard_tokens=1500)
        elif not finished:
            with pytest.raises(OutputExistsError):
                prepare(texts_source(texts), ByteTokenizer(), tmp_path / "out", shard_tokens=1500)
        assert content(tmp_path / "out") == content(tmp_path / "whole")
        assert sorted(os.listdir(tmp_path)) == ["out", "whole"]
        (tmp_path / "out").rename(tmp_path / "old")
        for path in sorted((tmp_path / "old").rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        (tmp_path / "old").rmdir()
        if finished:
            break
    assert 15 < last < 199


def test_real_text(shared_text, tmp_path, released):
    files = open_source(None, [shared_text / "books_val.jsonl.gz"])
    result = prepare(files, released, tmp_path / "out", shard_tokens=100_000, workers=2)
    texts = list(files)
    assert (result.train.n_documents, result.val.n_documents) == (195, 22)
    assert texts_of(result.val, released) == texts[::10]
    assert texts_of(result.train, released) == [text for i, text in enumerate(texts) if i % 10]


def test_the_partial_folder_is_beside_the_output():
    assert nmoe.data.prep_state.partial_path(Path("a/b.c")) == Path("a/b.c.partial")
