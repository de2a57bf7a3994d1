"""Batches made ahead: always those of the cursor that is asked for, and on a GPU never overwritten too early."""

import threading
import time

import numpy as np
import pytest
import torch
from nmoe.rdep.world import World, alone
from nmoe.train.batches import Batches, StepBatch
from nmoe.train.schema import TrainConfig

S = 6
SETTINGS = TrainConfig(steps=10, batch_size=4, micro_batch_size=2, seq_len=S)


class Numbered:
    """Sample n holds n's thousands and on."""

    def __init__(self, delay_s=0.0, fails_at=None):
        self.asked, self.threads, self.delay_s, self.fails_at = [], set(), delay_s, fails_at

    def batch(self, cursor, count):
        self.asked.append(cursor)
        self.threads.add(threading.get_ident())
        time.sleep(self.delay_s)
        if self.fails_at is not None and cursor >= self.fails_at:
            raise OSError(f"nothing at {cursor}")
        return 1000 * np.arange(cursor, cursor + count)[:, None] + np.arange(S + 1)


class Hidden:
    """Starts and targets that tell what they were made of."""

    def starts(self, sample_NS1):
        return (sample_NS1[:, :-1] % 7).astype(np.int32)

    def targets(self, sample_NS1):
        return np.where(sample_NS1[:, 1:] % 5 == 0, -100, sample_NS1[:, 1:])


@pytest.fixture
def made():
    """Makes Batches, which are closed in the end."""
    every = []

    def make(source, documents=None, world=None, settings=SETTINGS):
        every.append(Batches(source, settings, world or alone("cpu"), documents))
        return every[-1]

    yield make
    for batches in every:
        batches.close()


def cursors(batch):
    return (batch.sample_NS1[:, 0] // 1000).tolist()


def test_every_batch_is_read_once_ahead_by_another_thread_and_none_beyond_the_last_step(made):
    source = Numbered()
    batches = made(source)
    for step in range(10):
        assert cursors(batches.take(4 * step)) == [4 * step + i for i in range(4)]
    batches.close()
    assert source.asked == list(range(0, 40, 2))
    assert threading.get_ident() not in source.threads
    assert len(source.threads) == 1


def test_the_next_batch_is_made_while_the_last_is_in_use(made):
    source = Numbered()
    batches = made(source)
    batches.take(0)
    deadline = time.monotonic() + 10
    while len(source.asked) < 4 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert source.asked == [0, 2, 4, 6]


@pytest.mark.parametrize("jump", [0, 4, 12, 20])
def test_a_stale_batch_is_never_given(made, jump):
    """After a step was taken again or skipped, what had been made ahead is of another cursor."""
    batches = made(Numbered(delay_s=0.002))
    first = batches.take(8)
    again = batches.take(jump)
    assert cursors(first) == [8, 9, 10, 11], "nor is what was given before touched"
    assert cursors(again) == [jump + i for i in range(4)]
    assert cursors(batches.take(jump + 4)) == [jump + 4 + i for i in range(4)]


@pytest.mark.parametrize("world_size", [1, 2])
def test_micro_batches_go_to_the_ranks_in_turn(made, world_size):
    settings = SETTINGS.model_copy(update={"batch_size": 8})
    taken = {}
    for rank in range(world_size):
        world = World(rank, world_size, torch.device("cpu"))
        for number, micro in enumerate(made(Numbered(), world=world, settings=settings).take(16).micro_batches(2)):
            taken[number * world_size + rank] = cursors(micro)
    assert [taken[i] for i in range(4)] == [[16, 17], [18, 19], [20, 21], [22, 23]]


def test_documents_come_with_their_samples(made):
    batches = made(Numbered(), Hidden())
    for step in range(3):
        batch = batches.take(4 * step)
        sample, hidden = batch.sample_NS1.numpy(), Hidden()
        assert batch.document_start_NS.dtype == torch.int32
        assert np.array_equal(batch.document_start_NS, hidden.starts(sample))
        assert np.array_equal(batch.target_NS, hidden.targets(sample))
        assert batch.n_targets == (hidden.targets(sample) != -100).sum()
        for i, micro in enumerate(batch.micro_batches(2)):
            assert torch.equal(micro.target_NS, batch.target_NS[2 * i : 2 * i + 2])
            assert micro.n_targets == batch.n_targets


def test_an_error_comes_with_the_batch_that_it_is_of(made):
    batches = made(Numbered(fails_at=8))
    assert cursors(batches.take(0)) == [0, 1, 2, 3]
    assert cursors(batches.take(4)) == [4, 5, 6, 7]
    with pytest.raises(OSError, match="nothing at 8"):
        batches.take(8)
    assert cursors(batches.take(0)) == [0, 1, 2, 3], "and keeps from nothing else"


def test_an_error_ahead_is_no_matter_if_another_batch_is_asked_for(made):
    batches = made(Numbered(fails_at=8))
    batches.take(4)
    assert cursors(batches.take(0)) == [0, 1, 2, 3]


def test_closing_ends_the_thread_without_asking_for_more():
    source = Numbered(delay_s=0.01)
    batches = Batches(source, SETTINGS, alone("cpu"))
    batches.take(0)
    batches.close()
    asked = len(source.asked)
    time.sleep(0.05)
    assert len(source.asked) == asked <= 4


# ---- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.fixture
def own_stream():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU, found none")
    with torch.cuda.stream(torch.cuda.Stream()):
        yield
    torch.cuda.synchronize()


def busy(x):
    """Keeps the current stream busy for some milliseconds."""
    for _ in range(40):
        x = torch.mm(x, x).clamp_(-1, 1)
    return x


@pytest.mark.gpu
@pytest.mark.parametrize("documents", [None, Hidden()])
def test_a_slow_gpu_reads_every_batch_as_it_was_given(own_stream, made, documents):
    """The host runs steps ahead of the GPU, which copies each micro-batch out of the batch long after the call."""
    settings = SETTINGS.model_copy(update={"steps": 40, "batch_size": 8})
    batches = made(Numbered(), documents, alone("cuda"), settings)
    x = torch.zeros(2048, 2048, device="cuda")
    static, seen = None, []
    for step in range(40):
        batch = batches.take(8 * step)
        assert batch.sample_NS1.is_cuda
        if static is None:
            static = batch.buffers(2, torch.device("cuda"))
        for micro in batch.micro_batches(2):
            x = busy(x)
            static.copy_(micro)
            seen.append(StepBatch(*(None if tensor is None else tensor.clone() for tensor in static[:3])))
    torch.cuda.synchronize()
    expected = 1000 * torch.arange(40 * 8)[:, None] + torch.arange(S + 1)
    found = torch.cat([micro.sample_NS1 for micro in seen]).cpu()
    assert torch.equal(found, expected)
    if documents is not None:
        starts = torch.cat([micro.document_start_NS for micro in seen]).cpu()
        targets = torch.cat([micro.target_NS for micro in seen]).cpu()
        assert np.array_equal(starts, documents.starts(expected.numpy()))
        assert np.array_equal(targets, documents.targets(expected.numpy()))


@pytest.mark.gpu
def test_the_batch_before_is_still_there_when_the_host_asks_for_it_late(own_stream, made):
    batches = made(Numbered(), None, alone("cuda"))
    before = batches.take(0)
    for step in range(1, 10):
        batch = batches.take(4 * step)
        time.sleep(0.01)  # the next one is copied meanwhile
        torch.cuda.synchronize()
        assert cursors(before) == [4 * (step - 1) + i for i in range(4)]
        before = batch


@pytest.mark.gpu
def test_a_stale_batch_is_never_given_on_a_gpu(own_stream, made):
    batches = made(Numbered(), None, alone("cuda"))
    x = torch.zeros(2048, 2048, device="cuda")
    kept = []
    for cursor in (0, 4, 4, 20, 0, 4, 8, 36, 32, 36):
        x = busy(x)
        kept.append((cursor, batches.take(cursor).sample_NS1.clone()))
    for cursor, sample in kept:
        assert (sample[:, 0] // 1000).tolist() == [cursor + i for i in range(4)]


@pytest.mark.gpu
def test_batches_are_copied_while_a_graph_is_captured(own_stream, made):
    """The thread that copies may go on, whatever the step's stream is doing."""
    batches = made(Numbered(delay_s=0.02), None, alone("cuda"))
    static = batches.take(0).buffers(4, torch.device("cuda"))
    total = torch.zeros((), dtype=torch.int64, device="cuda")
    total.copy_(static.sample_NS1.sum())  # loads the kernels
    graph = torch.cuda.CUDAGraph()
    batch = batches.take(4)
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
        total.copy_(static.sample_NS1.sum())
        time.sleep(0.1)
    for step in range(1, 10):
        static.copy_(batch)
        graph.replay()
        expected = (1000 * torch.arange(4 * step, 4 * step + 4)[:, None] + torch.arange(S + 1)).sum()
        assert total.item() == expected
        if step < 9:
            batch = batches.take(4 * step + 4)
