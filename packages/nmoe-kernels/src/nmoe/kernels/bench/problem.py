"""What every layer is given: shapes, tensors from one seed, and a router that routes as asked.

A constant first column of x times the first column of the router's weight gives each expert a prior, so that the
routing is skewed the same way for every layer, without code in any of them.

Shapes: T tokens, D model width, F expert width, E experts, K experts per token, R = T·K rows.
"""

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Literal, get_args

import torch
from nmoe.kernels.errors import KernelError, ShapeError

RoutingKind = Literal["uniform", "zipf", "one"]
ROUTING_KINDS: tuple[RoutingKind, ...] = get_args(RoutingKind)

ZIPF_EXPONENT = 1.2
ONE_PRIOR = 10.0
"""Of the chosen experts; the others have its negative. Logits have a deviation of 0.02·√D, 1.3 at D = 4096."""
_WEIGHT_SCALE = 0.02


@dataclass(frozen=True)
class Shape:
    """Sizes of one MoE layer."""

    tokens: int
    width: int
    hidden: int
    n_experts: int
    top_k: int

    @property
    def rows(self) -> int:
        """R = T·K."""
        return self.tokens * self.top_k

    @property
    def forward_flop(self) -> int:
        """6·R·F·D: three products of R rows, two operations for each multiply-add. The router is not counted."""
        return 6 * self.rows * self.hidden * self.width

    @property
    def both_flop(self) -> int:
        """Forward and backward: 18·R·F·D."""
        return 3 * self.forward_flop

    def __str__(self) -> str:
        return ",".join(str(n) for n in astuple(self))


NAMED_SHAPES = {
    "qwen3-30b": Shape(32768, 2048, 768, 128, 8),
    "moonlet": Shape(32768, 2048, 1408, 64, 6),
    "super": Shape(65536, 768, 384, 256, 7),
}
DEFAULT_SHAPES = (
    Shape(40960, 768, 256, 128, 8),
    Shape(24576, 1536, 256, 128, 8),
    Shape(32768, 4096, 512, 128, 8),
    *NAMED_SHAPES.values(),
)


def parse_shape(text: str) -> Shape:
    """A shape from `T,D,F,E,K`, or from a name in `NAMED_SHAPES`.

    Raises:
        ShapeError: it is neither.
    """
    if text in NAMED_SHAPES:
        return NAMED_SHAPES[text]
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = []
    if len(sizes) != 5 or min(sizes) < 1 or sizes[4] > sizes[3]:
        raise ShapeError(
            f"expected a shape T,D,F,E,K of five positive integers with K ≤ E, or one of {', '.join(NAMED_SHAPES)}; "
            f"found '{text}': write it as 32768,2048,1408,64,6"
        )
    return Shape(*sizes)


@dataclass
class Problem:
    """Tensors of one layer. bf16, but for the router's weight, which is fp32."""

    shape: Shape
    x_TD: torch.Tensor
    dy_TD: torch.Tensor
    router_ED: torch.Tensor
    w13_e2FD: torch.Tensor
    w2_eDF: torch.Tensor


def router_prior(routing: RoutingKind, n_experts: int, top_k: int) -> list[float]:
    """What is added to each expert's logit."""
    if routing == "zipf":
        return [-ZIPF_EXPONENT * math.log(1 + expert) for expert in range(n_experts)]
    if routing == "one":
        return [ONE_PRIOR if expert < top_k else -ONE_PRIOR for expert in range(n_experts)]
    return [0.0] * n_experts


def make_problem(shape: Shape, routing: RoutingKind, device: torch.device | str, seed: int = 0) -> Problem:
    """Random tensors: x and dy from N(0, 1), weights from N(0, 0.02²); the same ones for the same seed and device."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*sizes: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*sizes, generator=generator, device=device, dtype=dtype)

    tokens, width, hidden, n_experts = shape.tokens, shape.width, shape.hidden, shape.n_experts
    x_TD, dy_TD = normal(tokens, width), normal(tokens, width)
    router_ED = normal(n_experts, width, dtype=torch.float32).mul_(_WEIGHT_SCALE)
    w13_e2FD = normal(n_experts, 2, hidden, width).mul_(_WEIGHT_SCALE)
    w2_eDF = normal(n_experts, width, hidden).mul_(_WEIGHT_SCALE)
    x_TD[:, 0] = 1
    router_ED[:, 0] = torch.tensor(router_prior(routing, n_experts, shape.top_k), device=device)
    return Problem(shape, x_TD, dy_TD, router_ED, w13_e2FD, w2_eDF)


def check_rows(counts: Sequence[int], shape: Shape, routing: RoutingKind) -> float:
    """The most loaded expert's rows over the mean, after a check that rows are spread over experts as asked.

    Raises:
        KernelError: they are not, or not all rows are there.
    """
    if sum(counts) != shape.rows or len(counts) != shape.n_experts:
        raise KernelError(
            f"expected {shape.rows} rows over {shape.n_experts} experts, found {sum(counts)} over {len(counts)}: "
            "the layer does not route as it says; its figures would be void"
        )
    ratio = max(counts) * len(counts) / sum(counts)
    most = shape.n_experts / shape.top_k  # one expert is chosen by every token
    kept = {
        "uniform": ratio <= max(1.0, min(2.5, most)),
        "zipf": ratio >= most / 2 and sum(counts[: len(counts) // 2]) > sum(counts) / 2,
        "one": all(n == (shape.tokens if expert < shape.top_k else 0) for expert, n in enumerate(counts)),
    }
    if not kept[routing]:
        raise KernelError(
            f"expected '{routing}' routing, found {ratio:.2f} times the mean rows on one expert and {max(counts)} rows "
            "at most: the layer does not use the router it was given"
        )
    return ratio
