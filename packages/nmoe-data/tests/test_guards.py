import time

import numpy as np
import pytest
from nmoe.data.bench.loader import write_set
from nmoe.data.errors import OverlapError, TokenizerMismatchError, TokenRangeError
from nmoe.data.guards import check_apart, check_shared_documents, check_tokenizer, check_vocabulary
from nmoe.data.prep import prepare_documents
from nmoe.data.shards import ShardSet
from nmoe.data.tokenizers import ByteTokenizer, load_tokenizer


def test_tokens_belong_to_one_tokenizer(byte_set, tiktoken_file, tmp_path):
    mine, theirs = ByteTokenizer(), load_tokenizer(str(tiktoken_file))
    shards = byte_set(["text"])
    check_tokenizer(shards, mine)
    with pytest.raises(TokenizerMismatchError, match=r"made_up.*'byte'"):
        check_tokenizer(shards, theirs)

    renamed = tmp_path / "renamed.tiktoken"
    renamed.write_bytes(tiktoken_file.read_bytes())
    other = prepare_documents({"train": ["text"]}, theirs, tmp_path / "other", source={}).train
    check_tokenizer(other, load_tokenizer(str(renamed)))


def test_the_model_must_know_every_id(byte_set):
    shards = byte_set(["text"])
    check_vocabulary(shards, 257)
    check_vocabulary(shards, 1000)
    with pytest.raises(TokenRangeError, match="257 or more"):
        check_vocabulary(shards, 256)


def documents(draw, n, vocabulary=255):
    """Random documents of 5 to 60 tokens with their EOS, one after the other, and where they end."""
    parts = [np.append(draw.integers(0, vocabulary, draw.integers(5, 60)), 256) for _ in range(n)]
    return parts


def as_set(token_set, parts, name, **options):
    ends = np.cumsum([part.size for part in parts])[:-1]
    return token_set(np.concatenate(parts), ends=ends.tolist(), n_vocab=257, eos_id=256, name=name, **options)


def test_validation_is_no_training_set(token_set):
    parts = documents(np.random.default_rng(0), 20)
    train, other = as_set(token_set, parts[:10], "train"), as_set(token_set, parts[10:], "other")
    check_apart([train, other], as_set(token_set, parts[5:9], "val"))
    with pytest.raises(OverlapError, match="found the training set"):
        check_apart([other, train], train)
    copy = as_set(token_set, parts[:10], "copy")
    with pytest.raises(OverlapError, match=r"copy/shard_00000\.npy.*train/shard_00000\.npy"):
        check_apart([other, train], copy)


def test_shared_documents_are_found_wherever_they_stand(token_set):
    draw = np.random.default_rng(0)
    parts = documents(draw, 300)
    trained = [as_set(token_set, parts[:100], "one"), as_set(token_set, parts[100:200], "two")]
    val = parts[200:]
    check_shared_documents(trained, as_set(token_set, val, "apart"))
    leaked = as_set(token_set, [*val[:50], parts[3], parts[150], *val[50:]], "leaked")
    with pytest.raises(OverlapError, match=r"leaked: .* 2 documents that stand in .*one and .*two too.*--dedupe"):
        check_shared_documents(trained, leaked)
    shuffled = [parts[i] for i in draw.permutation(200)]
    with pytest.raises(OverlapError, match=r"found 100\.0%, 200 documents"):
        check_shared_documents(trained, as_set(token_set, shuffled, "all", borders=()))


def test_a_few_shared_documents_are_let_be(token_set):
    parts = [part for part in documents(np.random.default_rng(0), 600) if part.size > 8]
    short = np.array([1, 2, 256])
    train = as_set(token_set, [*parts[:200], short], "train")
    check_shared_documents([train], as_set(token_set, [*parts[200:], short, short], "val"))


def test_alike_is_not_the_same(token_set):
    """Same length and same tokens in the places that are looked at first."""
    long = np.append(np.arange(200) % 50, 256)
    other = long.copy()
    other[1] += 1
    check_shared_documents([as_set(token_set, [long], "train")], as_set(token_set, [other], "val"))


def test_documents_of_a_large_set_are_compared_within_a_second(tmp_path):
    """64 MB here; a gigabyte within 16 times as long as the limit."""
    write_set(tmp_path / "train", n_shards=1, shard_tokens=1 << 24)
    train = ShardSet.open(tmp_path / "train")
    begun = time.process_time()  # what others do at the same time does not count
    with pytest.raises(OverlapError, match=r"100\.0%"):
        check_shared_documents([train], train)
    assert time.process_time() - begun < 1
