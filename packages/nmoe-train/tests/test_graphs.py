"""Pieces of a step in CUDA graphs: what they compute, and whose memory they use."""

import pytest
import torch
from nmoe.train.graphs import StepGraphs

pytestmark = pytest.mark.gpu
MIB = 1 << 20


@pytest.fixture(autouse=True)
def _own_stream():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU, found none")
    with torch.cuda.stream(torch.cuda.Stream()):
        yield
    torch.cuda.synchronize()


def test_pieces_run_eagerly_then_by_replay():
    graphs, calls = StepGraphs(), []
    x, total = torch.ones(4, device="cuda"), torch.zeros(4, device="cuda")

    def piece():
        calls.append(None)
        total.add_(x)

    graphs.run("piece", piece)
    graphs.warm()
    for value in (2.0, 3.0):
        x.fill_(value)
        graphs.run("piece", piece)
    assert total.tolist() == [6.0] * 4
    assert len(calls) == 2, "once eagerly, once for the capture; a replay calls nothing"
    graphs.release()
    graphs.run("piece", piece)
    assert total.tolist() == [9.0] * 4


def test_all_share_one_memory():
    """A second piece, and an evaluation, take no memory beyond what the first piece needed."""
    graphs, out = StepGraphs(), torch.zeros((), device="cuda")

    def piece():
        out.copy_(torch.ones(256 * MIB, dtype=torch.uint8, device="cuda").max())

    for name in ("first", "second"):
        graphs.run(name, piece)
    graphs.warm()
    graphs.run("first", piece)
    held = torch.cuda.memory_reserved()
    graphs.run("second", piece)
    with graphs.memory():
        evaluated = torch.full((240 * MIB,), 7, dtype=torch.uint8, device="cuda").max().item()
    graphs.run("first", piece)
    assert (evaluated, out.item()) == (7, 1)
    assert torch.cuda.memory_reserved() <= held
    graphs.release()
    assert torch.cuda.memory_reserved() < held
