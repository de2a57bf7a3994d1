"""Worker processes: order, errors, and what dies."""

import os
import signal
import time
from contextlib import suppress

import nmoe.data.workers
import numpy as np
import pytest
from nmoe.data.blocks import Cut, JsonlBlock, TextBlock
from nmoe.data.dedup import SeenDocuments
from nmoe.data.errors import SourceError, WorkerDiedError
from nmoe.data.tokenized import tokenize
from nmoe.data.tokenizers import ByteTokenizer, load_tokenizer
from nmoe.data.workers import default_workers, tokenize_blocks


def cuts(blocks):
    return [Cut(block, {"at": number}, number) for number, block in enumerate(blocks)]


def texts(count, size=1):
    # The first blocks take longest, so that later ones are done before them.
    return [TextBlock([f"{number} żółw " * (2000 if number % 3 == 0 else 1)] * size) for number in range(count)]


@pytest.mark.parametrize("workers", [2, 3])
def test_results_come_in_order_and_equal_those_of_one_process(workers, tiktoken_file):
    tokenizer, blocks = load_tokenizer(str(tiktoken_file)), cuts(texts(40, 3))
    alone = list(tokenize_blocks(blocks, tokenizer, 1, digests=True))
    spread = list(tokenize_blocks(blocks, tokenizer, workers, digests=True))
    assert [cut.after for cut, _ in spread] == [cut.after for cut in blocks]
    for (_, one), (_, other) in zip(alone, spread, strict=True):
        assert np.array_equal(one.tokens, other.tokens)
        assert np.array_equal(one.lengths, other.lengths)
        assert np.array_equal(one.n_bytes, other.n_bytes)
        assert one.digests == other.digests


def test_few_blocks_wait_at_once():
    """The source is read no further ahead than workers have use for."""
    read = []

    def source():
        for cut in cuts(texts(100)):
            read.append(cut)
            yield cut

    for number, _ in enumerate(tokenize_blocks(source(), ByteTokenizer(), 2, digests=False)):
        assert len(read) <= number + 4


def test_a_bad_block_is_told_in_its_turn():
    bad = JsonlBlock("a.jsonl", 7, b'{"text": "good"}\n{"text": 3}\n', "text")
    blocks = [*texts(5), bad, *texts(5)]
    for workers in (1, 2):
        results = tokenize_blocks(cuts(blocks), ByteTokenizer(), workers, digests=False)
        done = [next(results) for _ in range(5)]
        assert len(done) == 5
        with pytest.raises(SourceError) as caught:
            next(results)
        assert caught.value.what == "a.jsonl:8"
        assert "'text'" in caught.value.expected
        assert "int" in caught.value.found


def test_a_source_that_fails_comes_after_what_it_gave():
    def source():
        yield from cuts(texts(5))
        raise SourceError("x", expected="a", found="b", remedy="c")

    results = tokenize_blocks(source(), ByteTokenizer(), 2, digests=False)
    assert len([next(results) for _ in range(5)]) == 5
    with pytest.raises(SourceError):
        next(results)


def children():
    found = []
    for thread in os.listdir("/proc/self/task"):
        # A thread that has ended since has none.
        with suppress(FileNotFoundError, ProcessLookupError), open(f"/proc/self/task/{thread}/children") as handle:
            found += map(int, handle.read().split())
    return found


needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="needs Linux's /proc")


@needs_proc
@pytest.mark.parametrize(("number", "words"), [(signal.SIGKILL, "memory runs out"), (signal.SIGTERM, "SIGTERM")])
def test_a_worker_that_dies_is_told_and_nothing_hangs(number, words):
    before = set(children())
    results = tokenize_blocks(cuts(texts(500)), ByteTokenizer(), 2, digests=False)
    next(results)
    os.kill(next(iter(set(children()) - before)), number)
    start = time.monotonic()
    with pytest.raises(WorkerDiedError, match=words) as caught:
        list(results)
    assert time.monotonic() - start < 10
    assert "Run the same command again" in caught.value.remedy
    assert set(children()) <= before, "the others ended too"


@needs_proc
def test_workers_end_with_their_caller():
    before, open_files = set(children()), len(os.listdir("/proc/self/fd"))
    results = tokenize_blocks(cuts(texts(500)), ByteTokenizer(), 2, digests=False)
    next(results)
    assert len(set(children()) - before) == 2
    results.close()
    assert set(children()) <= before
    assert len(os.listdir("/proc/self/fd")) == open_files


class Deadly(ByteTokenizer):
    """Ends the process that it is sent to."""

    def __reduce__(self):
        return os._exit, (3,)


def test_a_worker_that_cannot_start_is_told():
    with pytest.raises(WorkerDiedError, match="exit code 3"):
        list(tokenize_blocks(cuts(texts(3)), Deadly(), 2, digests=False))


def test_workers_suit_the_work(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(6)), raising=False)
    assert default_workers(None) == 6
    assert default_workers(1000) == 1
    assert default_workers(3 * nmoe.data.workers._BYTES_A_WORKER) == 3
    assert default_workers(10**12) == 6


def test_tokenizing_nothing():
    made = tokenize([], ByteTokenizer(), digests=True)
    assert (made.tokens.size, made.lengths.size, made.n_bytes.size, made.digests) == (0, 0, 0, b"")


def test_taking_documents():
    made = tokenize(["ab", "żó", "", "c"], ByteTokenizer())
    part = made.take(np.array([False, True, False, True]))
    assert part.tokens.tolist() == [*"żó".encode(), 256, ord("c"), 256]
    assert (part.lengths.tolist(), part.n_bytes.tolist()) == ([5, 2], [4, 1])
    head = made.head(2)
    assert head.tokens.tolist() == made.tokens[:8].tolist()


def test_what_was_not_committed_is_forgotten(tmp_path):
    def digest(*numbers):
        return b"".join(number.to_bytes(16, "little") for number in numbers)

    with SeenDocuments(tmp_path / "seen.db", 0) as seen:
        assert seen.first_times(digest(1, 2, 1, 3)).tolist() == [True, True, False, True]
        seen.commit()
        assert seen.first_times(digest(3, 4)).tolist() == [False, True]
    with SeenDocuments(tmp_path / "seen.db", 4) as seen:
        assert seen.first_times(digest(3, 4)).tolist() == [False, True]
        seen.commit()
    # Committed, and yet beyond what the state on disk speaks of.
    with SeenDocuments(tmp_path / "seen.db", 2) as seen:
        assert seen.first_times(digest(1, 2, 3, 4)).tolist() == [False, False, True, True]


def test_a_commit_that_was_interrupted_half_way_is_made_again(tmp_path):
    """Ctrl-C between the end of a transaction and the next one's beginning: the state is then saved once more."""
    with SeenDocuments(tmp_path / "seen.db", 0) as seen:
        assert seen.first_times(bytes(range(32))).all()
        seen._connection.execute("COMMIT")
        seen.commit()
        assert not seen.first_times(bytes(range(32))).any()
        seen.commit()
    with SeenDocuments(tmp_path / "seen.db", 2) as seen:
        assert not seen.first_times(bytes(range(16))).any()
