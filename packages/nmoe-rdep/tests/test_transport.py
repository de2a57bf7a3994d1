"""The local transport against the experts themselves, and what is said of transports that are not there yet."""

import pytest
import torch
from nmoe.kernels.ops import select_ops
from nmoe.kernels.reference.routing import Routing, index_rows
from nmoe.rdep.errors import RdepError, TransportUnavailableError
from nmoe.rdep.schema import RdepConfig
from nmoe.rdep.transport import LocalTransport, open_transport

OPS = select_ops("reference", "cpu")
TOKENS, WIDTH, HIDDEN, EXPERTS, TOP_K = 17, 6, 4, 5, 2


def draw(n_reached: int = EXPERTS) -> tuple[torch.Tensor, Routing, torch.Tensor, torch.Tensor]:
    """x, a routing (to the first `n_reached` experts only), w13, w2."""
    torch.manual_seed(0)
    expert_TK = torch.rand(TOKENS, n_reached).argsort(1)[:, :TOP_K].contiguous()
    weights = torch.randn(EXPERTS, 2, HIDDEN, WIDTH), torch.randn(EXPERTS, WIDTH, HIDDEN)
    return torch.randn(TOKENS, WIDTH), Routing(expert_TK, torch.rand(TOKENS, TOP_K)), *weights


@pytest.mark.parametrize("n_reached", [EXPERTS, 2])
def test_local_equals_the_experts_bit_for_bit(n_reached: int) -> None:
    x, routing, w13, w2 = draw(n_reached)
    out, _ = LocalTransport().routed_experts(OPS, x, routing, w13, w2)
    index = index_rows(routing.expert_TK, EXPERTS)
    assert torch.equal(out, OPS.experts(x, index, routing.gate_TK, w13, w2))


def test_local_equals_each_token_alone() -> None:
    """A token's output does not depend on the tokens beside it."""
    x, routing, w13, w2 = draw()
    out, _ = LocalTransport().routed_experts(OPS, x, routing, w13, w2)
    for t in range(TOKENS):
        alone = Routing(*(part[t : t + 1] for part in routing))
        one, _ = LocalTransport().routed_experts(OPS, x[t : t + 1], alone, w13, w2)
        torch.testing.assert_close(one[0], out[t], rtol=1e-5, atol=1e-6)


def test_gradients_reach_every_input() -> None:
    x, routing, w13, w2 = draw()
    leaves = [tensor.requires_grad_() for tensor in (x, routing.gate_TK, w13, w2)]
    out, load_E = LocalTransport().routed_experts(OPS, x, routing, w13, w2)
    out.square().sum().backward()
    assert all(leaf.grad is not None and leaf.grad.any() for leaf in leaves)
    assert not load_E.requires_grad


@pytest.mark.parametrize("n_reached", [EXPERTS, 2])
def test_load_counts_every_routed_row_once(n_reached: int) -> None:
    x, routing, w13, w2 = draw(n_reached)
    _, load_E = LocalTransport().routed_experts(OPS, x, routing, w13, w2)
    assert load_E.dtype == torch.int32
    assert load_E.sum() == TOKENS * TOP_K
    assert load_E.tolist() == [int((routing.expert_TK == expert).sum()) for expert in range(EXPERTS)]


def test_local_is_what_one_rank_opens() -> None:
    assert isinstance(open_transport(RdepConfig(), 1), LocalTransport)


@pytest.mark.parametrize(("transport", "world_size"), [("ipc", 1), ("ipc", 8), ("local", 2)])
def test_what_is_not_there_is_refused_with_the_remedy(transport: str, world_size: int) -> None:
    with pytest.raises(TransportUnavailableError) as caught:
        open_transport(RdepConfig(transport=transport), world_size)
    message = str(caught.value)
    assert isinstance(caught.value, RdepError)
    assert f"'{transport}' and {world_size}" in message, "what was found"
    assert "--set rdep.transport=local" in message, "the remedy"
    assert "runtime.world_size=1" in message, "the remedy"
