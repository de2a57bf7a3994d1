import pytest
from nmoe.data.errors import TokenizerMismatchError, TokenRangeError
from nmoe.data.guards import check_tokenizer, check_vocabulary
from nmoe.data.prep import prepare
from nmoe.data.tokenizers import ByteTokenizer, load_tokenizer


def test_tokens_belong_to_one_tokenizer(byte_set, tiktoken_file, tmp_path):
    mine, theirs = ByteTokenizer(), load_tokenizer(str(tiktoken_file))
    shards = byte_set(["text"])
    check_tokenizer(shards, mine)
    with pytest.raises(TokenizerMismatchError, match=r"made_up.*'byte'"):
        check_tokenizer(shards, theirs)

    renamed = tmp_path / "renamed.tiktoken"
    renamed.write_bytes(tiktoken_file.read_bytes())
    other = prepare(["text"], theirs, tmp_path / "other", val_fraction=0, source={}).train
    check_tokenizer(other, load_tokenizer(str(renamed)))


def test_the_model_must_know_every_id(byte_set):
    shards = byte_set(["text"])
    check_vocabulary(shards, 257)
    check_vocabulary(shards, 1000)
    with pytest.raises(TokenRangeError, match="257 or more"):
        check_vocabulary(shards, 256)
