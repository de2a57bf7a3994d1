"""`tiles`: times each candidate tile of each grouped product, and prints what `nmoe.kernels.native.tiles.TABLE` lacks.

Shapes: as in `nmoe.kernels.native.grouped_gemm_cuda`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from nmoe.kernels.bench.problem import Problem, RoutingKind, Shape, make_problem
from nmoe.kernels.bench.report import tflops
from nmoe.kernels.bench.timing import time_gpu

if TYPE_CHECKING:
    from nmoe.kernels.native.tiles import Tile

ROUNDS = 3
_LEAST_GAIN = 0.01
"""Below this the faster tile is not worth a line: clocks differ by as much."""

Times = Mapping[str, Mapping["Tile", float]]


def print_tiles(shapes: Sequence[Shape], routings: Sequence[RoutingKind]) -> None:
    """Prints milliseconds and TFLOP/s of each product and tile by shape and routing, and the lines for `TABLE`."""
    lines: dict[str, None] = {}
    for shape in shapes:
        for routing in routings:
            times = time_tiles(shape, routing)
            print("\n".join(_table(f"{shape} {routing}", shape, times)), flush=True)
            lines |= dict.fromkeys(table_lines(shape, times))
    print("\nLines for nmoe.kernels.native.tiles.TABLE, where the untabled choice is slower by 1% or more:")
    print("\n".join(lines) if lines else "(none)", flush=True)


def time_tiles(shape: Shape, routing: RoutingKind) -> Times:
    """Median milliseconds by product and tile; candidates take turns, so that clocks and heat are shared."""
    from nmoe.kernels.native.tiles import CANDIDATES

    times: dict[str, dict[Tile, list[float]]] = {
        product: {tile: [] for tile in tiles} for product, tiles in CANDIDATES.items()
    }
    runs = _products(make_problem(shape, routing, "cuda"))
    for product, by_tile in times.items():
        for _ in range(ROUNDS):
            for tile, found in by_tile.items():
                found.append(time_gpu(lambda product=product, tile=tile: runs[product](tile)).median_ms)  # type: ignore[misc]
    return {product: {tile: median(ms) for tile, ms in by_tile.items()} for product, by_tile in times.items()}


def _products(problem: Problem) -> dict[str, Callable[["Tile | None"], Any]]:
    """Each product as the layer's training step calls it, by the tile."""
    from nmoe.kernels.native import grouped_gemm_cuda as gemm
    from nmoe.kernels.ops import select_ops
    from nmoe.kernels.router import router_logits

    ops, x_TD, dout_TD = select_ops("native", "cuda"), problem.x_TD, problem.dy_TD
    w13_e2FD, w2_eDF, n_experts = problem.w13_e2FD, problem.w2_eDF, problem.shape.n_experts
    bias_E = torch.zeros(n_experts, device="cuda")
    routing = ops.route(router_logits(x_TD, problem.router_ED), bias_E, top_k=problem.shape.top_k)
    gate_TK, index = routing.gate_TK, ops.index_rows(routing, n_experts)
    dw13_e2FD, dw2_eDF = (torch.empty(w.shape, device="cuda") for w in (w13_e2FD, w2_eDF))
    activation_RF, pre_R2F = gemm.up(x_TD, index, w13_e2FD, keep_pre=True)
    gated_RF, dpre_R2F, _ = gemm.dgrad_activation(dout_TD, index, gate_TK, w2_eDF, pre_R2F)
    return {
        "up": lambda tile: gemm.up(x_TD, index, w13_e2FD, keep_pre=True, tile=tile),
        "down": lambda tile: gemm.down(activation_RF, index, gate_TK, w2_eDF, tile=tile),
        "dgrad_activation": lambda tile: gemm.dgrad_activation(dout_TD, index, gate_TK, w2_eDF, pre_R2F, tile=tile),
        "dgrad_input": lambda tile: gemm.dgrad_input(dpre_R2F, index, w13_e2FD, tile=tile),
        "wgrad_down": lambda tile: gemm.wgrad_down(dout_TD, gated_RF, index, dw2_eDF, add=False, tile=tile),
        "wgrad_up": lambda tile: gemm.wgrad_up(dpre_R2F, x_TD, index, dw13_e2FD, add=False, tile=tile),
    }


def product_flop(product: str, shape: Shape) -> int:
    """2·R·F·D, and twice that for the products over gate and up."""
    return shape.forward_flop // 3 * (2 if product in ("up", "dgrad_input", "wgrad_up") else 1)


def untabled_tile(product: str, shape: Shape) -> "Tile":
    """What `choose_tile` gives where `TABLE` has no line."""
    from nmoe.kernels.native.tiles import TABLE, choose_tile

    key = (product, shape.width, shape.hidden)
    listed = TABLE.pop(key, None)
    try:
        return choose_tile(*key)
    finally:
        if listed is not None:
            TABLE[key] = listed


def table_lines(shape: Shape, times: Times) -> Iterator[str]:
    """Lines of `TABLE` for the products whose fastest tile is another than the untabled choice."""
    for product, by_tile in times.items():
        fastest = min(by_tile, key=lambda tile: by_tile[tile])  # called at once
        untabled = untabled_tile(product, shape)
        gain = by_tile[untabled] / by_tile[fastest] - 1
        if fastest != untabled and gain >= _LEAST_GAIN:
            key = f'("{product}", {shape.width}, {shape.hidden})'
            yield f"    {key}: Tile({fastest.m}, {fastest.n}),  # {gain:.1%} faster at {shape}"


def _table(title: str, shape: Shape, times: Times) -> Iterator[str]:
    from nmoe.kernels.native.tiles import choose_tile

    yield title
    for product, by_tile in times.items():
        chosen = choose_tile(product, shape.width, shape.hidden)
        for tile, ms in by_tile.items():
            rate = tflops(product_flop(product, shape), ms)
            marks = ("*" if ms == min(by_tile.values()) else " ") + (" chosen" if tile == chosen else "")
            yield f"  {product:16}  {tile.m:3} x {tile.n:3}  {ms:8.3f} ms  {rate:6.1f} TFLOP/s {marks}".rstrip()
