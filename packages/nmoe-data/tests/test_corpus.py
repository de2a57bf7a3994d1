import os
import subprocess
import sys
import time

import pytest
from nmoe.data.corpus import corpus_description, prepare_corpus, pydoc_documents, unique_paragraphs
from nmoe.data.errors import ArgumentError, CorpusUnavailableError, TokenizerMismatchError
from nmoe.data.prep import gzip_bits_per_byte
from nmoe.data.shards import ShardSet
from nmoe.data.tokenizers import ByteTokenizer


def test_paragraphs_are_kept_where_they_come_first():
    topics = {
        "b": "Title\n\n   indented\n   twice\n \t\nshared  words\nhere\n",
        "a": "Other\n\nshared words here\n\n\n\nOther",
        "c": "indented twice\n\nTitle",
    }
    assert unique_paragraphs(topics) == ["Other\n\nshared words here", "Title\n\n   indented\n   twice"]


def test_pydoc_has_the_size_and_order_that_are_promised():
    documents = pydoc_documents()
    assert documents == pydoc_documents()
    assert len(documents) >= 70
    assert sum(len(text.encode()) for text in documents) > 300_000
    assert documents[0].startswith('The "assert" statement')
    folded = [" ".join(paragraph.split()) for text in documents for paragraph in text.split("\n\n")]
    assert len(folded) == len(set(folded))


def test_prepared_once_and_quickly(tmp_path):
    tokenizer = ByteTokenizer()
    start = time.perf_counter()
    path = prepare_corpus("pydoc", tokenizer, tmp_path)
    assert time.perf_counter() - start < 2
    assert path == tmp_path / "pydoc-byte"
    written = (path / "train" / "shard_00000.npy").stat().st_mtime_ns
    assert prepare_corpus("pydoc", tokenizer, tmp_path) == path
    assert (path / "train" / "shard_00000.npy").stat().st_mtime_ns == written

    train, val = ShardSet.open(path / "train", verify="checksums"), ShardSet.open(path / "val", verify="checksums")
    documents = pydoc_documents()
    assert val.n_documents == round(len(documents) / 10)
    texts = [tokenizer.decode(shards.document(i)) for shards in (train, val) for i in range(shards.n_documents)]
    assert texts == documents
    # Measured: 2.39 and 2.43 with the text of Python 3.11.
    assert 2.2 < gzip_bits_per_byte(train, tokenizer) < 2.6
    assert 2.2 < gzip_bits_per_byte(val, tokenizer) < 2.6


def test_two_processes_at_once_share_one_result(tmp_path):
    program = (
        "import sys; from pathlib import Path; from nmoe.data import ShardSet, load_tokenizer, prepare_corpus\n"
        "tokenizer = load_tokenizer('byte'); import nmoe.data.corpus\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "path = prepare_corpus('pydoc', tokenizer, Path(sys.argv[1]))\n"
        "print(ShardSet.open(path / 'train', verify='checksums').fingerprint)\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    results = {process.communicate(timeout=60)[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len(results) == 1
    assert os.listdir(tmp_path) == ["pydoc-byte"]


def test_tokens_of_another_tokenizer_are_refused(tmp_path, monkeypatch):
    prepare_corpus("pydoc", ByteTokenizer(), tmp_path)
    other = ByteTokenizer()
    object.__setattr__(other.vocabulary, "pattern", "other")
    with pytest.raises(TokenizerMismatchError, match="train"):
        prepare_corpus("pydoc", other, tmp_path)


def test_a_python_without_the_text_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(CorpusUnavailableError, match="n data prep"):
        prepare_corpus("pydoc", ByteTokenizer(), tmp_path)


def test_other_names_are_refused(tmp_path):
    with pytest.raises(ArgumentError, match="'pydoc'"):
        prepare_corpus("books", ByteTokenizer(), tmp_path)
    assert "pydoc_data.topics" in corpus_description("pydoc")
