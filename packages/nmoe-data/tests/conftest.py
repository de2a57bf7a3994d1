import base64
import re
import socket
import struct
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from nmoe.data.blocks import Cut, TextBlock
from nmoe.data.corpus import pydoc_documents
from nmoe.data.manifest import FileRecord, Manifest, ShardRecord, TokenizerRecord, write_manifest
from nmoe.data.prep import prepare_documents
from nmoe.data.shards import ShardSet, file_sha256
from nmoe.data.sources import Source
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
        return prepare_documents({"train": texts}, ByteTokenizer(), output, source={}, shard_tokens=shard_tokens).train

    return make


@pytest.fixture
def token_set(tmp_path):
    """Writes a shard set of given tokens, whatever they are: `borders` cut it into shards, `ends` into documents."""

    def make(tokens, borders=(), *, ends=(), name="tokens", n_vocab=None, eos_id=None, n_bytes=1):
        tokens = np.asarray(tokens, np.uint32)
        n_vocab = int(tokens.max()) + 1 if n_vocab is None else n_vocab
        eos_id = n_vocab - 1 if eos_id is None else eos_id
        path = tmp_path / name
        path.mkdir(parents=True)
        records, starts = [], {0, *borders, *ends}
        for number, (low, high) in enumerate(pairwise([0, *borders, tokens.size])):
            index = np.array(sorted(start - low for start in starts if low <= start < high), np.int64)
            files = []
            for array, suffix in ((tokens[low:high], "npy"), (index, "idx")):
                file = path / f"shard_{number:05}.{suffix}"
                with open(file, "wb") as handle:
                    np.lib.format.write_array(handle, array)
                files.append(FileRecord(name=file.name, bytes=file.stat().st_size, sha256=file_sha256(file)))
            records.append(ShardRecord(tokens=files[0], index=files[1], n_tokens=high - low, n_documents=index.size))
        made_by = TokenizerRecord(name="made up", fingerprint="0" * 64, n_vocab=n_vocab, eos_id=eos_id)
        counts = {"n_tokens": tokens.size, "n_documents": sum(record.n_documents for record in records)}
        manifest = Manifest(tool="test", tokenizer=made_by, n_bytes=n_bytes, source={}, shards=records, **counts)
        write_manifest(path, manifest)
        return ShardSet.open(path)

    return make


class Texts(Source):
    """Documents at hand as a source: `size` of them a block; `fail_at` raises `error` before that block."""

    def __init__(self, texts, size=7, *, fail_at=None, error=None, label="texts"):
        self.texts, self.size, self.fail_at, self.error, self.label = list(texts), size, fail_at, error, label
        self.total = len(self.texts)

    def blocks(self, start=None):
        first = start["at"] if start else 0
        for number, low in enumerate(range(first, len(self.texts), self.size)):
            if number == self.fail_at:
                raise self.error
            high = min(low + self.size, len(self.texts))
            yield Cut(TextBlock(self.texts[low:high]), {"at": high}, high)

    def describe(self):
        return {"kind": "texts"}

    def identity(self):
        return {"label": self.label}

    def __str__(self):
        return "texts"


@pytest.fixture
def texts_source():
    return Texts


class Web:
    """A server on the loopback address: files with ranges and ETags, and whatever faults a test asks for."""

    def __init__(self):
        self.files = {}
        self.faults = []
        """One for each coming request, None for none: a status, or ("cut" | "reset", bytes that still go out)."""
        self.requests = []
        """(path, Range) of each."""
        self.ranges = True
        web = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_GET(self):
                web.answer(self)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, request):
        asked = request.headers.get("Range")
        self.requests.append((request.path, asked))
        fault = self.faults.pop(0) if self.faults else None
        if isinstance(fault, int):
            request.send_error(fault)
            return
        name = request.path.partition("?")[0]
        if name not in self.files:
            request.send_error(404)
            return
        data = self.files[name]
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and self.ranges else 0
        request.send_response(206 if start else 200)
        request.send_header("Content-Length", str(len(data) - start))
        request.send_header("ETag", f'"{hash(data)}"')
        if start:
            request.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        request.end_headers()
        kind, count = fault or ("whole", len(data))
        try:
            request.wfile.write(data[start : start + count])
            request.wfile.flush()
        except OSError:
            return  # the reader hung up, as it does when it seeks
        if kind == "reset":
            # Closing with this option sends a reset instead of an end.
            request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            request.connection.close()

    def close(self):
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def web():
    server = Web()
    yield server
    server.close()
