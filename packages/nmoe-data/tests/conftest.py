import base64
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from nmoe.data.corpus import pydoc_documents
from nmoe.data.prep import prepare
from nmoe.data.tokenizers import ByteTokenizer, load_tokenizer

SHARED = Path(__file__).resolve().parents[3].parent / "shared"


@pytest.fixture
def shared_text():
    """The folder of real text, where it is present."""
    folder = SHARED / "data" / "text"
    if not folder.is_dir():
        pytest.skip("needs shared/data/text beside the repository")
    return folder


@pytest.fixture(params=["gpt2", "o200k_harmony"])
def released(request, monkeypatch):
    """A published tokenizer, where its ranks are present."""
    folder = SHARED / "tokenizers"
    if not folder.is_dir():
        pytest.skip("needs shared/tokenizers beside the repository")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(folder))
    return load_tokenizer(request.param)


def train_ranks(text: str, merges: int) -> dict[bytes, int]:
    """Byte-pair training, the slow and plain way, on words with their leading space."""
    words = Counter(" " + word for word in text.split())
    pieces = {word: [bytes([value]) for value in word.encode()] for word in words}
    ranks = {bytes([value]): value for value in range(256)}
    for _ in range(merges):
        pairs = Counter()
        for word, parts in pieces.items():
            for pair in pairwise(parts):
                pairs[pair] += words[word]
        left, right = max(pairs, key=lambda pair: (pairs[pair], pair))
        ranks[left + right] = len(ranks)
        for parts in pieces.values():
            for i in range(len(parts) - 1, 0, -1):
                if i < len(parts) and (parts[i - 1], parts[i]) == (left, right):
                    parts[i - 1 : i + 1] = [left + right]
    return ranks


def write_tiktoken(path: Path, ranks: dict[bytes, int]) -> Path:
    lines = [base64.b64encode(token) + b" " + str(rank).encode() for token, rank in ranks.items()]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


@pytest.fixture(scope="session")
def made_up_ranks():
    """300 merges learned from real text, runs of one letter, and a word that merging cannot reach."""
    ranks = train_ranks(" ".join(pydoc_documents())[:20_000], 300)
    for token in (b"zz", b"zzz", b"12", b"123", b"1234", "żółw".encode()):
        ranks[token] = len(ranks)
    return ranks


@pytest.fixture(scope="session")
def tiktoken_file(tmp_path_factory, made_up_ranks):
    """A small local `.tiktoken` file."""
    return write_tiktoken(tmp_path_factory.mktemp("tiktoken") / "made_up.tiktoken", made_up_ranks)


@pytest.fixture
def byte_set(tmp_path):
    """Makes a byte-tokenized training set from texts; small shards, so that their borders are in play."""

    def make(texts, shard_tokens=50, name="set"):
        output = tmp_path / name
        return prepare(texts, ByteTokenizer(), output, val_fraction=0, source={}, shard_tokens=shard_tokens).train

    return make
