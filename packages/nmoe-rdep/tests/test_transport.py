"""The local transport against the experts themselves, and what is said of transports that do not fit the ranks."""

import pytest
import torch
from nmoe.kernels.ops import select_ops
from nmoe.kernels.reference.routing import Routing, index_rows
from nmoe.rdep.errors import RdepError, TransportUnavailableError
from nmoe.rdep.schema import RdepConfig
from nmoe.rdep.transport import LocalTransport, open_transport
from nmoe.rdep.world import World, alone

OPS = select_ops("reference", "cpu")
TOKENS, WIDTH, HIDDEN, EXPERTS, TOP_K = 17, 6, 4, 5, 2
LAYER = LocalTransport().layer(WIDTH, TOP_K, EXPERTS)


def draw(n_reached: int = EXPERTS) -> tuple[torch.Tensor, Routing, torch.Tensor, torch.Tensor]:
    """x, a routing (to the first `n_reached` experts only), w13, w2."""
    torch.manual_seed(0)
    expert_TK = torch.rand(TOKENS, n_reached).argsort(1)[:, :TOP_K].contiguous()
    weights = torch.randn(EXPERTS, 2, HIDDEN, WIDTH), torch.randn(EXPERTS, WIDTH, HIDDEN)
    return torch.randn(TOKENS, WIDTH), Routing(expert_TK, torch.rand(TOKENS, TOP_K)), *weights


@pytest.mark.parametrize("n_reached", [EXPERTS, 2])
def test_local_equals_the_experts_bit_for_bit(n_reached: int) -> None:
    x, routing, w13, w2 = draw(n_reached)
    out, _, _ = LAYER(OPS, x, routing, w13, w2, lambda: None)
    index = index_rows(routing.expert_TK, EXPERTS)
    assert torch.equal(out, OPS.experts(x, index, routing.gate_TK, w13, w2))


def test_local_equals_each_token_alone() -> None:
    """A token's output does not depend on the tokens beside it."""
    x, routing, w13, w2 = draw()
    out, _, _ = LAYER(OPS, x, routing, w13, w2, lambda: None)
    for t in range(TOKENS):
        alone = Routing(*(part[t : t + 1] for part in routing))
        one, _, _ = LAYER(OPS, x[t : t + 1], alone, w13, w2, lambda: None)
        torch.testing.assert_close(one[0], out[t], rtol=1e-5, atol=1e-6)


def test_gradients_reach_every_input() -> None:
    x, routing, w13, w2 = draw()
    leaves = [tensor.requires_grad_() for tensor in (x, routing.gate_TK, w13, w2)]
    out, load_E, _ = LAYER(OPS, x, routing, w13, w2, lambda: None)
    out.square().sum().backward()
    assert all(leaf.grad is not None and leaf.grad.any() for leaf in leaves)
    assert not load_E.requires_grad


@pytest.mark.parametrize("n_reached", [EXPERTS, 2])
def test_load_counts_every_routed_row_once(n_reached: int) -> None:
    x, routing, w13, w2 = draw(n_reached)
    _, load_E, _ = LAYER(OPS, x, routing, w13, w2, lambda: None)
    assert load_E.dtype == torch.int32
    assert load_E.sum() == TOKENS * TOP_K
    assert load_E.tolist() == [int((routing.expert_TK == expert).sum()) for expert in range(EXPERTS)]


@pytest.mark.parametrize("transport", [None, "local"])
def test_local_is_what_one_rank_opens(transport: str | None) -> None:
    opened = open_transport(RdepConfig(transport=transport), alone("cpu"), max_tokens=1, dtype=torch.float32)
    assert isinstance(opened, LocalTransport)
    assert opened.n_local(EXPERTS) == EXPERTS
    assert int(opened.faults.healthy) == 1
    opened.faults.check()
    opened.close()


@pytest.mark.parametrize(
    ("transport", "size", "served"),
    [
        ("ipc", 1, "several ranks on GPUs"),
        ("shm", 1, "several ranks on CPUs"),
        ("local", 2, "one rank"),
        ("ipc", 2, "several ranks on GPUs"),
    ],
)
def test_what_cannot_serve_the_ranks_is_refused_with_the_remedy(transport: str, size: int, served: str) -> None:
    world = World(0, size, torch.device("cpu"))
    with pytest.raises(TransportUnavailableError) as caught:
        open_transport(RdepConfig(transport=transport), world, max_tokens=1, dtype=torch.float32)
    message = str(caught.value)
    assert isinstance(caught.value, RdepError)
    assert f"rdep.transport = '{transport}' serves {served}, found runtime.world_size = {size}" in message
    assert "leave out rdep.transport" in message, "the remedy"
