"""The native experts' distance from float64 against that of the same layer of PyTorch's bf16 ops (`-m gpu`)."""

import pytest
import torch
import torch.nn.functional as F
from nmoe.kernels.ops import select_ops
from nmoe.kernels.router import router_logits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
    ),
]
TOKENS, WIDTH, HIDDEN, EXPERTS, TOP_K = 2048, 512, 256, 16, 4


def torch_layer(x, order, offsets, gate_R, w13, w2) -> torch.Tensor:
    """In the dtype of its inputs: grouped products in bf16, a loop over experts in float64."""
    token_R = order // TOP_K
    rows = x[token_R]
    up_weight, down_weight = w13.flatten(1, 2).transpose(1, 2), w2.transpose(1, 2)
    if x.dtype == torch.float64:
        ends = offsets.tolist()
        starts = [0, *ends[:-1]]

        def product(a, weight):
            return torch.cat([a[i:j] @ weight[e] for e, (i, j) in enumerate(zip(starts, ends, strict=True))])

    else:

        def product(a, weight):
            return F.grouped_mm(a, weight, offs=offsets)

    gate, up = product(rows, up_weight).chunk(2, -1)
    y = product(F.silu(gate) * up, down_weight)
    return torch.zeros_like(x).index_add(0, token_R, y * gate_R.to(y.dtype)[:, None])


def test_errors_are_at_most_those_of_torch() -> None:
    ops = select_ops("native", "cuda")
    x = torch.randn(TOKENS, WIDTH, device="cuda").bfloat16()
    w13 = (torch.randn(EXPERTS, 2, HIDDEN, WIDTH, device="cuda") * 0.05).bfloat16()
    w2 = (torch.randn(EXPERTS, WIDTH, HIDDEN, device="cuda") * 0.05).bfloat16()
    dout = torch.randn_like(x)
    router = torch.randn(EXPERTS, WIDTH, device="cuda") * 0.05
    routing = ops.route(router_logits(x, router), torch.zeros(EXPERTS, device="cuda"), top_k=TOP_K)
    index = ops.index_rows(routing, EXPERTS)
    order, offsets = index.order_R.long(), index.offset_E[1:].contiguous()

    def gradients(function, dtype) -> list[torch.Tensor]:
        leaves = [t.to(dtype).detach().requires_grad_() for t in (x, w13, w2)]
        gate_TK = routing.gate_TK.to(torch.promote_types(dtype, torch.float32)).detach().requires_grad_()
        out = function(*leaves, gate_TK)
        out.backward(dout.to(dtype))
        return [out.detach(), *(leaf.grad for leaf in (*leaves, gate_TK))]

    def of_torch(x, w13, w2, gate_TK) -> torch.Tensor:
        return torch_layer(x, order, offsets, gate_TK.flatten()[order], w13, w2)

    exact = gradients(of_torch, torch.float64)
    peer = gradients(of_torch, torch.bfloat16)
    ours = gradients(lambda x, w13, w2, gate_TK: ops.experts(x, index, gate_TK, w13, w2), torch.bfloat16)
    for name, a, b, c in zip(("out", "dx", "dw13", "dw2", "dgate"), ours, peer, exact, strict=True):
        found, theirs = (float((t.double() - c).norm() / c.norm()) for t in (a, b))
        print(f"{name}: ours {found:.2e}, torch {theirs:.2e}")
        assert found <= theirs, name
