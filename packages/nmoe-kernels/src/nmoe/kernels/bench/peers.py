"""The layers that are compared, all of one scope: router, top-k, experts, combine.

Ours and two peers, each imported only where it is built. A peer gets the same weights in the layout it wants.

Shapes: T tokens, D model width, F expert width, E experts, e experts on this rank (all of them), K experts per
token, R = T·K rows.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib import import_module

import torch
from nmoe.kernels.bench import machine
from nmoe.kernels.bench.problem import Problem
from torch.nn import functional as F


class Layer(ABC):
    """What the worker measures. A layer sets `_weights`: the router's, and the experts' two."""

    packages: tuple[str, ...]
    """Whose versions belong to its figures, beside PyTorch's and Triton's."""
    weight_grad: str
    """The dtype of the experts' weight gradients."""
    _weights: tuple[torch.Tensor, ...]

    @abstractmethod
    def _run(self, x_TD: torch.Tensor) -> tuple[torch.Tensor, Callable[[], torch.Tensor]]:
        """The output, and what gives the experts' numbers of rows: called outside of what is timed."""

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        """The training forward: what the backward needs is kept."""
        return self._run(x_TD)[0]

    def gradients(self, x_TD: torch.Tensor, out_TD: torch.Tensor, dy_TD: torch.Tensor) -> list[torch.Tensor]:
        """Of x, the router's weight, and the experts' two weights."""
        return list(torch.autograd.grad(out_TD, (x_TD, *self._weights), dy_TD))

    def versions(self) -> dict[str, str]:
        """Of what its figures depend on."""
        return machine.versions(self.packages)

    def rows_per_expert(self, x_TD: torch.Tensor) -> list[int]:
        """As this layer itself routes."""
        return self._run(x_TD)[1]().tolist()


class NmoeLayer(Layer):
    """Ours: sigmoid scores of fp32 logits, and fp32 weight gradients that each backward overwrites.

    Native on a CUDA device, the reference elsewhere.
    """

    packages = ("nmoe-kernels", "cuda-core", "cuda-bindings")
    weight_grad = "fp32"

    def __init__(self, problem: Problem) -> None:
        from nmoe.kernels.ops import select_ops
        from nmoe.kernels.router import router_logits_and_tokens

        device = problem.x_TD.device
        self._ops = select_ops("native" if device.type == "cuda" else "reference", device)
        self._router = router_logits_and_tokens
        self._n_experts, self._top_k = problem.shape.n_experts, problem.shape.top_k
        self._bias_E = torch.zeros(self._n_experts, device=device)
        self._experts = (problem.w13_e2FD.requires_grad_(), problem.w2_eDF.requires_grad_())
        self._weights = (problem.router_ED.requires_grad_(), *self._experts)
        for weight in self._experts:
            weight.main_grad = torch.zeros(weight.shape, device=device)  # type: ignore[attr-defined]

    def gradients(self, x_TD: torch.Tensor, out_TD: torch.Tensor, dy_TD: torch.Tensor) -> list[torch.Tensor]:
        """As the base's; the experts' are their `main_grad`, overwritten."""
        for weight in self._experts:
            weight.main_grad_stale = True  # type: ignore[attr-defined]
        dx_TD, drouter_ED, *_ = torch.autograd.grad(out_TD, (x_TD, *self._weights), dy_TD, allow_unused=True)
        return [dx_TD, drouter_ED, *(weight.main_grad for weight in self._experts)]  # type: ignore[attr-defined]

    def versions(self) -> dict[str, str]:
        """As the base's, with NVRTC's own."""
        from nmoe.kernels.runtime.nvrtc import nvrtc_version

        return super().versions() | {"nvrtc": nvrtc_version()}

    def _run(self, x_TD: torch.Tensor) -> tuple[torch.Tensor, Callable[[], torch.Tensor]]:
        logits_TE, x_TD = self._router(x_TD, self._weights[0])
        routing = self._ops.route(logits_TE, self._bias_E, top_k=self._top_k)
        index = self._ops.index_rows(routing, self._n_experts)
        return self._ops.experts(x_TD, index, routing.gate_TK, *self._experts), index.offset_E.diff


class TorchLayer(Layer):
    """PyTorch's grouped matmul over rows sorted by expert. Nothing is read back to the host."""

    packages = ()
    weight_grad = "bf16"

    def __init__(self, problem: Problem) -> None:
        self._top_k = problem.shape.top_k
        self._edges = torch.arange(1, problem.shape.n_experts + 1, device=problem.x_TD.device)
        self._weights = (
            problem.router_ED.bfloat16().requires_grad_(),
            problem.w13_e2FD.flatten(1, 2).mT.contiguous().requires_grad_(),
            problem.w2_eDF.mT.contiguous().requires_grad_(),
        )

    def _run(self, x_TD: torch.Tensor) -> tuple[torch.Tensor, Callable[[], torch.Tensor]]:
        router_ED, w13_eD2F, w2_eFD = self._weights
        score_TE = torch.softmax((x_TD @ router_ED.mT).float(), -1)
        gate_TK, expert_TK = torch.topk(score_TE, self._top_k, dim=-1)
        expert_R, order_R = torch.sort(expert_TK.flatten(), stable=True)
        end_E = torch.searchsorted(expert_R, self._edges, out_int32=True)
        token_R = order_R // self._top_k
        gate_RF, up_RF = torch._grouped_mm(x_TD[token_R], w13_eD2F, end_E).chunk(2, -1)
        y_RD = torch._grouped_mm(F.silu(gate_RF) * up_RF, w2_eFD, end_E)
        gated_RD = y_RD * gate_TK.flatten()[order_R, None].to(y_RD.dtype)
        out_TD = torch.zeros_like(x_TD).index_add(0, token_R, gated_RD)
        return out_TD, lambda: end_E.diff(prepend=end_E.new_zeros(1))


class SonicLayer(Layer):
    """SonicMoE's layer function (arXiv:2512.14080), without the auxiliary loss of its module."""

    packages = ("sonic-moe", "quack-kernels", "nvidia-cutlass-dsl")
    weight_grad = "bf16"

    def __init__(self, problem: Problem) -> None:
        # Imported by name: it is in its own process's path, not among this package's dependencies.
        self._layer = import_module("sonicmoe.functional").moe_TC_softmax_topk_layer
        self._activation = import_module("sonicmoe.enums").ActivationType.SWIGLU
        self._top_k = problem.shape.top_k
        self._weights = (
            problem.router_ED.bfloat16().requires_grad_(),
            problem.w13_e2FD.transpose(1, 2).flatten(1, 2).contiguous().requires_grad_(),  # gate and up rows by turns
            problem.w2_eDF.requires_grad_(),
        )

    def _run(self, x_TD: torch.Tensor) -> tuple[torch.Tensor, Callable[[], torch.Tensor]]:
        router_ED, w13_eXD, w2_eDF = self._weights
        stream = torch.cuda.current_stream().cuda_stream  # within a capture, the capture's
        up, down = w13_eXD.permute(1, 2, 0), w2_eDF.permute(1, 2, 0)
        out_TD, _, rows_E = self._layer(
            x_TD, router_ED, up, None, down, None, self._top_k, stream, self._activation, False
        )
        return out_TD, lambda: rows_E


LAYERS: dict[str, Callable[[Problem], Layer]] = {"nmoe": NmoeLayer, "torch": TorchLayer, "sonic": SonicLayer}
PEERS = tuple(name for name in LAYERS if name != "nmoe")
