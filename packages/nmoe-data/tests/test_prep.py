import gzip
import os
import random
import subprocess
import sys
import time
import tracemalloc

import nmoe.data.prep
import numpy as np
import pytest
from nmoe.data.errors import (
    ArgumentError,
    EmptySourceError,
    OutputExistsError,
    SourceChangedError,
    SourceError,
    TokenRangeError,
    WriteError,
)
from nmoe.data.prep import gzip_bits_per_byte, prepare
from nmoe.data.shards import ShardSet
from nmoe.data.sources import TextFiles
from nmoe.data.tokenizers import ByteTokenizer, load_tokenizer


def texts_of(shards, tokenizer):
    return [tokenizer.decode(shards.document(number)) for number in range(shards.n_documents)]


def make_texts(count, seed=0):
    draw = random.Random(seed)
    return [f"document {i}: " + "żółw and tortoise " * draw.randrange(1, 9) for i in range(count)]


@pytest.mark.parametrize(
    ("count", "fraction", "n_val"), [(100, 0.1, 10), (78, 0.1, 8), (5, 0.01, 1), (2, 0.5, 1), (7, 0, 0)]
)
def test_validation_is_the_last_documents(tmp_path, tiktoken_file, count, fraction, n_val):
    texts, tokenizer = make_texts(count), load_tokenizer(str(tiktoken_file))
    result = prepare(texts, tokenizer, tmp_path / "out", val_fraction=fraction, source={}, shard_tokens=300)
    assert texts_of(result.train, tokenizer) == texts[: count - n_val]
    assert result.train.n_bytes == sum(len(text.encode()) for text in texts[: count - n_val])
    assert sorted(os.listdir(tmp_path / "out")) == (["train", "val"] if n_val else ["train"])
    if n_val:
        assert texts_of(result.val, tokenizer) == texts[count - n_val :]
        assert result.val.n_bytes == sum(len(text.encode()) for text in texts[count - n_val :])
    else:
        assert result.val is None


def test_the_split_does_not_depend_on_batches(tmp_path, monkeypatch):
    texts, tokenizer = make_texts(50), ByteTokenizer()
    prints = set()
    for size in (1, 3, 7, 50, 1000):
        monkeypatch.setattr(nmoe.data.prep, "_BATCH_DOCUMENTS", size)
        result = prepare(texts, tokenizer, tmp_path / str(size), val_fraction=0.3, source={})
        prints.add((result.train.fingerprint, result.val.fingerprint))
    assert len(prints) == 1


def test_every_document_ends_with_eos(tmp_path, tiktoken_file):
    texts, tokenizer = make_texts(20), load_tokenizer(str(tiktoken_file))
    shards = prepare(texts, tokenizer, tmp_path / "out", val_fraction=0, source={}).train
    everything = [token for text in texts for token in [*tokenizer.encode(text), tokenizer.eos_id]]
    assert shards.tokens(0, shards.n_tokens).tolist() == everything


def test_files_end_to_end(tmp_path):
    (tmp_path / "book.txt").write_text("\n\n".join(f"paragraph {i} " * 50 for i in range(1000)))
    files = TextFiles([tmp_path / "book.txt"])
    result = prepare(files, ByteTokenizer(), tmp_path / "out", val_fraction=0.2, source=files.describe())
    assert texts_of(result.train, ByteTokenizer()) + texts_of(result.val, ByteTokenizer()) == list(files)
    source = result.train.manifest.source
    assert source["first"] == ["book.txt"]
    assert source["bytes"] == (tmp_path / "book.txt").stat().st_size
    assert str(tmp_path) not in (tmp_path / "out" / "train" / "manifest.json").read_text()


def test_memory_does_not_grow_with_the_text(tmp_path):
    class Documents:
        def __init__(self, count):
            self.count = count

        def __iter__(self):
            return ("0123456789" * 1000 + str(i) for i in range(self.count))

    peaks = []
    for count in (500, 3000):
        tracemalloc.start()
        prepare(
            Documents(count), ByteTokenizer(), tmp_path / str(count), val_fraction=0.01, source={}, shard_tokens=10**6
        )
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # 5 and 30 MB of text, 20 and 120 MB of tokens.
    assert peaks[1] < 1.1 * peaks[0]


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputExistsError, match="out"):
        prepare(make_texts(5), ByteTokenizer(), tmp_path / "out", val_fraction=0.5, source={})
    (tmp_path / "file").write_text("precious")
    with pytest.raises(OutputExistsError):
        prepare(make_texts(5), ByteTokenizer(), tmp_path / "file", val_fraction=0.5, source={})
    assert (tmp_path / "file").read_text() == "precious"


def test_an_output_that_appears_meanwhile_is_kept(tmp_path):
    def appear(done, total):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "precious").write_text("x")

    with pytest.raises(OutputExistsError):
        prepare(make_texts(5), ByteTokenizer(), tmp_path / "out", val_fraction=0.5, source={}, progress=appear)
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == ["precious"]


class Failing:
    """Gives two documents, and fails on the reading asked for."""

    def __init__(self, reading, error):
        self.reading, self.error, self.readings = reading, error, 0

    def __iter__(self):
        self.readings += 1
        yield "one"
        if self.readings == self.reading:
            raise self.error
        yield "two"


@pytest.mark.parametrize("reading", [1, 2])
@pytest.mark.parametrize("error", [SourceError("x", expected="a", found="b", remedy="c"), KeyboardInterrupt()])
def test_an_error_leaves_nothing_behind(tmp_path, monkeypatch, reading, error):
    monkeypatch.setattr(nmoe.data.prep, "_BATCH_DOCUMENTS", 1)
    open_files = len(os.listdir("/dev/fd"))
    with pytest.raises(type(error)):
        prepare(Failing(reading, error), ByteTokenizer(), tmp_path / "out", val_fraction=0.5, source={})
    assert os.listdir(tmp_path) == []
    assert len(os.listdir("/dev/fd")) == open_files


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WriteError, match="No space left"):
        prepare(make_texts(5), ByteTokenizer(), tmp_path / "out", val_fraction=0.5, source={})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("first", "second"), [(3, 4), (4, 3), (600, 1200)])
def test_a_source_that_changes_is_noticed(tmp_path, first, second):
    class Changing:
        readings = 0

        def __iter__(self):
            self.readings += 1
            yield from make_texts(first if self.readings == 1 else second)

    documents = Changing()
    with pytest.raises(SourceChangedError, match=str(first)):
        prepare(documents, ByteTokenizer(), tmp_path / "out", val_fraction=0.5, source={})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("texts", "fraction"), [([], 0), ([], 0.1), (["one"], 0.1), (["a", "b"], 0.9), (["", ""], 0.5)]
)
def test_too_little_text_is_refused(tmp_path, texts, fraction):
    with pytest.raises(EmptySourceError):
        prepare(texts, ByteTokenizer(), tmp_path / "out", val_fraction=fraction, source={})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("arguments", [{"val_fraction": 1}, {"val_fraction": -0.1}, {"val_fraction": float("nan")}])
def test_impossible_fractions_are_refused(tmp_path, arguments):
    with pytest.raises(ArgumentError, match="val_fraction"):
        prepare(["a", "b"], ByteTokenizer(), tmp_path / "out", source={}, **arguments)


def test_one_shot_iterators_and_empty_shards_are_refused(tmp_path):
    with pytest.raises(ArgumentError, match="twice"):
        prepare(iter(["a", "b"]), ByteTokenizer(), tmp_path / "out", val_fraction=0, source={})
    with pytest.raises(ArgumentError, match="shard_tokens"):
        prepare(["a", "b"], ByteTokenizer(), tmp_path / "out", val_fraction=0, source={}, shard_tokens=0)


def test_a_tokenizer_that_breaks_its_word_is_refused(tmp_path):
    class Broken(ByteTokenizer):
        def encode_batch(self, texts):
            return [np.array([257], np.uint32) for _ in texts]

    with pytest.raises(TokenRangeError, match="257"):
        prepare(["a", "b"], Broken(), tmp_path / "out", val_fraction=0, source={})


def test_progress_is_told(tmp_path):
    told = []
    prepare(
        make_texts(1100),
        ByteTokenizer(),
        tmp_path / "out",
        val_fraction=0.1,
        source={},
        progress=lambda *now: told.append(now),
    )
    assert told == [(512, 1100), (1024, 1100), (1100, 1100)]


def test_gzip_is_measured_on_the_text(tmp_path):
    tokenizer, texts = ByteTokenizer(), make_texts(300)
    result = prepare(texts, tokenizer, tmp_path / "out", val_fraction=0.3, source={})
    for shards in (result.train, result.val):
        text = "".join(texts_of(shards, tokenizer)).encode()
        expected = 8 * len(gzip.compress(text, 9)) / len(text)
        assert gzip_bits_per_byte(shards, tokenizer) == pytest.approx(expected, abs=1e-3)
    assert result.val.manifest.gzip_bits_per_byte == gzip_bits_per_byte(result.val, tokenizer)


SLOW_PREP = """
import sys
from pathlib import Path
import nmoe.data.prep
from nmoe.data import load_tokenizer, prepare

class Documents:
    def __iter__(self):
        return (f"document {i} " * 20_000 for i in range(40))

nmoe.data.prep._BATCH_DOCUMENTS = 1
options = dict(val_fraction=0.1, source={}, shard_tokens=10**6, progress=lambda done, total: print(done, flush=True))
prepare(Documents(), load_tokenizer("byte"), Path(sys.argv[1]), **options)
"""


@pytest.mark.parametrize("kill_after", [1, 20, 36, 40])
def test_a_killed_prep_leaves_a_whole_output_or_none(tmp_path, kill_after):
    """Killed in the first shard, in the middle, between the sets, and in the last steps."""
    output = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", SLOW_PREP, str(output)], stdout=subprocess.PIPE)
    for _ in range(kill_after):
        process.stdout.readline()
    time.sleep(random.uniform(0, 0.03))
    process.kill()
    process.communicate()
    if output.exists():
        ShardSet.open(output / "train", verify="checksums")
        ShardSet.open(output / "val", verify="checksums")
    else:
        prepare(make_texts(5), ByteTokenizer(), output, val_fraction=0.2, source={})
        assert os.listdir(tmp_path) == ["out"], "what the killed process left is gone"


def test_real_text(shared_text, tmp_path, released):
    files = TextFiles([shared_text / "books_val.jsonl.gz"])
    result = prepare(files, released, tmp_path / "out", val_fraction=0.1, source=files.describe(), shard_tokens=100_000)
    texts = list(files)
    assert (result.train.n_documents, result.val.n_documents) == (195, 22)
    assert texts_of(result.train, released) + texts_of(result.val, released) == texts
