"""A whole MoE layer over W ranks: router, top-k, dispatch, experts, return, combine; forward and backward.

TFLOP/s a GPU count 6·T·K·F·D forward and 12·T·K·F·D backward for T tokens a rank. Each rank owns E / W experts, and the
layer's batch is W·T tokens: experts see more rows the more ranks there are. The backward is what forward and backward
take together less the forward.

Shapes: T tokens of a rank, D width, F expert width, E experts, K experts per token.
"""

from typing import Any

import torch
from nmoe.kernels.ops import select_ops
from nmoe.kernels.router import router_logits_and_tokens
from nmoe.rdep.bench.timing import time_graph
from nmoe.rdep.schema import RdepConfig
from nmoe.rdep.transport import open_transport
from nmoe.rdep.world import World

SHAPES = {
    "qwen3-30b": (8192, 2048, 768, 128, 8),
    "moonlight": (8192, 2048, 1408, 64, 6),
    "moonlight, 32768 tokens": (32768, 2048, 1408, 64, 6),
    "super": (65536, 768, 384, 256, 7),
}
_CAPACITY = 1.5


def measure_layer(world: World, T: int, D: int, F: int, E: int, K: int) -> dict[str, Any]:
    """Milliseconds and TFLOP/s a GPU of the forward in evaluation, of forward and backward, and of their difference."""
    torch.manual_seed(0)
    device, ops = world.device, select_ops("native", world.device)
    config = RdepConfig(capacity_factor=_CAPACITY, timeout_s=30.0)
    transport = open_transport(config, world, max_tokens=T, dtype=torch.bfloat16)
    layer, n_local = transport.layer(D, K, E), transport.n_local(E)

    def randn(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16) * scale

    router = torch.randn(E, D, device=device) * D**-0.5
    w13, w2 = randn(n_local, 2, F, D, scale=D**-0.5), randn(n_local, D, F, scale=F**-0.5)
    weights: tuple[Any, ...] = (router, w13, w2)
    for weight in weights:
        weight.requires_grad_()
        weight.main_grad = torch.empty(weight.shape, device=device)
        weight.main_grad_stale = True
    torch.manual_seed(1 + world.rank)
    x, dout, bias = randn(T, D).requires_grad_(), randn(T, D), torch.zeros(E, device=device)

    def forward() -> torch.Tensor:
        logits, tokens = router_logits_and_tokens(x, router)
        return layer(ops, tokens, ops.route(logits, bias, top_k=K), w13, w2, lambda: None)[0]

    def evaluate() -> None:
        with torch.no_grad():
            forward()

    def train() -> None:
        for weight in weights:
            weight.main_grad_stale = True
        torch.autograd.backward(forward(), dout)
        x.grad = None

    forward_ms, both_ms = time_graph(world, evaluate, 4), time_graph(world, train, 2)
    torch.cuda.synchronize()
    transport.faults.check()
    world.barrier()
    transport.close()
    flops = 6 * T * K * F * D / 1e9
    return {
        "tokens": T,
        "dim": D,
        "hidden": F,
        "experts": E,
        "top_k": K,
        "forward_ms": forward_ms,
        "forward_backward_ms": both_ms,
        "forward_tflops": flops / forward_ms,
        "backward_tflops": 2 * flops / (both_ms - forward_ms),
        "forward_backward_tflops": 3 * flops / both_ms,
    }
