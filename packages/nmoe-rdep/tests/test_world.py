"""The ranks of a run, as processes: collectives against plain sums, and what is said when a rank is missing."""

import socket

import pytest
import torch
from nmoe.rdep.errors import WorldError
from nmoe.rdep.world import alone, join_world

SCRIPT = "world_ranks.py"


@pytest.mark.parametrize(
    ("size", "device"),
    [
        (2, "cpu"),
        (4, "cpu"),
        pytest.param(2, "cuda", marks=pytest.mark.multigpu(2)),
        pytest.param(4, "cuda", marks=pytest.mark.multigpu(4)),
        pytest.param(8, "cuda", marks=pytest.mark.multigpu(8)),
    ],
)
def test_collectives(ranks, size: int, device: str) -> None:
    """Sums, minima, pieces, barriers and shared values; the script asserts."""
    ranks.run_ranks(SCRIPT, size, "collectives", device)


def test_a_rank_that_never_joins_is_named(ranks) -> None:
    ranks.run_ranks(SCRIPT, 2, "absent", "cpu")


@pytest.mark.parametrize("lost", [0, 1])
def test_a_rank_that_dies_is_an_error_on_the_other(ranks, lost: int) -> None:
    assert "told" in ranks.run_ranks(SCRIPT, 2, f"lost{lost}", "cpu")[1 - lost]


def test_one_rank_alone_touches_nothing() -> None:
    world = alone("cpu")
    for dtype in (torch.float32, torch.bfloat16):
        whole = torch.randn(7).to(dtype)
        kept, version = whole.clone(), whole._version
        world.sum_(whole)
        world.min_(whole)
        world.gather_(whole)
        world.scatter_sum(whole, whole)
        assert torch.equal(whole, kept)
        assert whole._version == version, "not even written with what it held"
        piece = torch.empty_like(whole)
        world.scatter_sum(whole, piece)
        assert torch.equal(piece, kept)
    world.barrier()
    assert world.share("name", b"value") == [b"value"]
    assert (world.rank, world.size, world.store) == (0, 1, None)
    world.close()


def test_a_world_of_one_needs_no_address() -> None:
    world = join_world(rank=0, size=1, address="", port=0, device="cpu", timeout_s=1)
    assert world.size == 1
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("rank", "device", "found"),
    [(2, "cpu", "found 2"), (-1, "cpu", "found -1"), (0, "cuda", "found 'cuda'"), (0, "cuda:99", "found 'cuda:99'")],
)
def test_no_such_rank_or_device(rank: int, device: str, found: str) -> None:
    with pytest.raises(WorldError, match=f"expected .*{found}.*: "):
        join_world(rank=rank, size=2, address="127.0.0.1", port=1, device=device, timeout_s=1)


def test_nothing_answers_at_the_address(ranks) -> None:
    port = ranks.free_port()
    with pytest.raises(WorldError, match=rf"expected rank 1 to find .*127.0.0.1:{port} within 1 s, found .*: start"):
        join_world(rank=1, size=2, address="127.0.0.1", port=port, device="cpu", timeout_s=1)


def test_another_program_has_the_port() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(WorldError, match=rf"expected rank 0 to open .*127.0.0.1:{port} .*, found .*: start"):
            join_world(rank=0, size=2, address="127.0.0.1", port=port, device="cpu", timeout_s=1)
