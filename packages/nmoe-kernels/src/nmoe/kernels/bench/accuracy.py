"""`accuracy`: the experts' distance from float64 beside that of the same layer of PyTorch's bf16 ops.

Shapes: T tokens, D model width, F expert width, E experts, K experts per token, R = T·K rows sorted by expert.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from nmoe.kernels.bench import machine, results
from nmoe.kernels.bench.peers import NmoeLayer
from nmoe.kernels.bench.problem import Shape
from torch.nn import functional as F

SHAPE = Shape(2048, 512, 256, 16, 4)
TENSORS = ("out", "dx", "dw13", "dw2", "dgate")
NOTE = (
    "Relative Frobenius distance from the same layer in float64, all given one routing and one set of bf16 inputs: "
    "ours, and PyTorch's grouped_mm, silu and index_add in bf16. Random normal data; weights times 0.05."
)


@dataclass(frozen=True)
class Distances:
    """Of one tensor: ‖found - exact‖ / ‖exact‖."""

    ours: float
    torch: float

    @property
    def ratio(self) -> float:
        """Ours over PyTorch's."""
        return self.ours / self.torch

    @property
    def kept(self) -> bool:
        """Ours is at most PyTorch's; a NaN is not."""
        return self.ours <= self.torch


def measure_distances(shape: Shape = SHAPE, device: torch.device | str = "cuda", seed: int = 0) -> dict[str, Distances]:
    """By tensor, in the order of `TENSORS`. Native on a CUDA device, the reference elsewhere.

    Raises:
        UnsupportedArchError: the native tier has no kernels for the GPU.
    """
    from nmoe.kernels.ops import select_ops
    from nmoe.kernels.router import router_logits

    device = torch.device(device)
    ops = select_ops("native" if device.type == "cuda" else "reference", device)
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*sizes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*sizes, generator=generator, device=device, dtype=dtype)

    n_experts, top_k = shape.n_experts, shape.top_k
    x_TD = normal(shape.tokens, shape.width).bfloat16()
    w13_E2FD = (normal(n_experts, 2, shape.hidden, shape.width) * 0.05).bfloat16()
    w2_EDF = (normal(n_experts, shape.width, shape.hidden) * 0.05).bfloat16()
    dout_TD = normal(shape.tokens, shape.width, dtype=torch.bfloat16)
    router_ED = normal(n_experts, shape.width) * 0.05
    routing = ops.route(router_logits(x_TD, router_ED), torch.zeros(n_experts, device=device), top_k=top_k)
    index = ops.index_rows(routing, n_experts)
    order_R, end_E = index.order_R.long(), index.offset_E[1:].contiguous()

    def step(layer: Callable[..., torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [t.to(dtype).detach().requires_grad_() for t in (x_TD, w13_E2FD, w2_EDF)]
        gate_dtype = torch.promote_types(dtype, torch.float32)
        leaves.append(routing.gate_TK.to(gate_dtype).detach().requires_grad_())
        out_TD = layer(*leaves)
        return [out_TD.detach(), *torch.autograd.grad(out_TD, leaves, dout_TD.to(dtype))]

    def of_torch(x: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, gate_TK: torch.Tensor) -> torch.Tensor:
        return _torch_layer(x, order_R, end_E, gate_TK, w13, w2)

    def of_ours(x: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, gate_TK: torch.Tensor) -> torch.Tensor:
        return ops.experts(x, index, gate_TK, w13, w2)

    exact = step(of_torch, torch.float64)
    peer = step(of_torch, torch.bfloat16)
    ours = step(of_ours, torch.bfloat16)
    return {
        name: Distances(_distance(mine, right), _distance(theirs, right))
        for name, mine, theirs, right in zip(TENSORS, ours, peer, exact, strict=True)
    }


def print_accuracy(
    *, command: str, output: Path | None, measure: Callable[[], Mapping[str, Distances]] = measure_distances
) -> bool:
    """Measures in this process and prints; says whether ours is at most PyTorch's distance for every tensor.

    Either way the distances are written to `output`, with what `results.header` gives.

    Raises:
        UnsupportedArchError: the native tier has no kernels for the GPU.
    """
    found = measure()
    print(f"{'tensor':8} {'ours':>9} {'torch':>9} {'ratio':>6}")
    for name, one in found.items():
        print(f"{name:8} {one.ours:9.2e} {one.torch:9.2e} {one.ratio:6.3f}{'' if one.kept else '  above torch'}")
    kept = all(one.kept for one in found.values())
    written = results.header(command, machine.describe_gpu(), _versions()) | {
        "note": NOTE,
        "shape": str(SHAPE),
        "at_most_torch": kept,
        "distances": {
            name: {"ours": _rounded(one.ours), "torch": _rounded(one.torch), "ratio": _rounded(one.ratio)}
            for name, one in found.items()
        },
    }
    results.write(written, output)
    return kept


def _distance(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def _torch_layer(
    x_TD: torch.Tensor,
    order_R: torch.Tensor,
    end_E: torch.Tensor,
    gate_TK: torch.Tensor,
    w13_E2FD: torch.Tensor,
    w2_EDF: torch.Tensor,
) -> torch.Tensor:
    """In the dtype of its inputs: grouped products in bf16, a loop over experts in float64."""
    token_R, gate_R = order_R // gate_TK.shape[1], gate_TK.flatten()[order_R]
    product = _looped_product if x_TD.dtype == torch.float64 else _grouped_product
    gate_RF, up_RF = product(x_TD[token_R], w13_E2FD.flatten(1, 2).transpose(1, 2), end_E).chunk(2, -1)
    y_RD = product(F.silu(gate_RF) * up_RF, w2_EDF.transpose(1, 2), end_E)
    return torch.zeros_like(x_TD).index_add(0, token_R, y_RD * gate_R.to(y_RD.dtype)[:, None])


def _grouped_product(rows: torch.Tensor, weight: torch.Tensor, end_E: torch.Tensor) -> torch.Tensor:
    return F.grouped_mm(rows, weight, offs=end_E)


def _looped_product(rows: torch.Tensor, weight: torch.Tensor, end_E: torch.Tensor) -> torch.Tensor:
    ends = end_E.tolist()
    return torch.cat([rows[i:j] @ weight[e] for e, (i, j) in enumerate(zip([0, *ends[:-1]], ends, strict=True))])


def _versions() -> dict[str, str]:
    from nmoe.kernels.runtime.nvrtc import nvrtc_version

    return machine.versions(NmoeLayer.packages) | {"nvrtc": nvrtc_version()}


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
