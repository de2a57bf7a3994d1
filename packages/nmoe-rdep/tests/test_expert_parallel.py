"""Expert parallelism over ranks that are processes: against one rank's layer, bit for bit from launch to launch, and
what is said when something is wrong. The same scripts run on CPUs over shared memory and on GPUs over NVLink."""

import pytest

SCRIPT = "expert_parallel_ranks.py"
ON = [
    (2, "cpu"),
    (4, "cpu"),
    pytest.param(2, "cuda", marks=pytest.mark.multigpu(2)),
    pytest.param(4, "cuda", marks=pytest.mark.multigpu(4)),
]


@pytest.mark.parametrize(("size", "device"), ON)
def test_a_layer_of_several_ranks(ranks, size: int, device: str) -> None:
    """Outputs and all gradients are one rank's, loads are conserved, also with skew, without tokens, and in evaluation;
    launches with random delays give the same bits; many exchanges of random sizes find no mismatch; what a layer was
    not made for is refused; too many rows end with the factor that is then enough. All in one start of the ranks, which
    is what takes the time."""
    ranks.run_ranks(SCRIPT, size, device, "equals", "bits", "stress200", "refusals", "overflow")


@pytest.mark.parametrize(("size", "device"), [ON[0], ON[2]])
def test_a_dead_peer_is_named(ranks, size: int, device: str) -> None:
    ranks.run_ranks(SCRIPT, size, device, "dead")


@pytest.mark.soak
@pytest.mark.parametrize(("size", "device"), ON)
def test_ten_thousand_exchanges_find_no_mismatch(ranks, size: int, device: str) -> None:
    ranks.run_ranks(SCRIPT, size, device, "stress10000", timeout_s=900)
