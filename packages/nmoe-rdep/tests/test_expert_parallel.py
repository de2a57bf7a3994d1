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


@pytest.mark.parametrize(("size", "device"), ON[2:])
def test_tokens_that_travel_in_waves(ranks, size: int, device: str) -> None:
    """The same of more tokens, which GPUs send in waves, computing the first while the last travel."""
    ranks.run_ranks(SCRIPT, size, device, "equals:1500", "bits:5000", "stress200:3000", "overflow:1500")


@pytest.mark.parametrize(("size", "device"), [ON[0], ON[2]])
def test_a_dead_peer_is_named(ranks, size: int, device: str) -> None:
    ranks.run_ranks(SCRIPT, size, device, "dead")


@pytest.mark.soak
@pytest.mark.parametrize(("size", "device"), ON)
def test_ten_thousand_exchanges_find_no_mismatch(ranks, size: int, device: str) -> None:
    most = (96, 1500) if device == "cuda" else (96,)
    ranks.run_ranks(SCRIPT, size, device, *(f"stress10000:{n}" for n in most), timeout_s=900)
