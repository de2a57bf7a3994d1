"""Causal attention's forward to a window of keys, within documents or whole samples, with the same bits in every run.

A program owns a block of queries and goes through the keys that one of them sees. Documents shorten this loop, and hide
what tiles at their edges have of others. Scores, softmax and sums are fp32, operands of products bf16.

Source: FlashAttention-2 (arXiv:2307.08691), algorithm 1; the mask is ours.

Shapes: B batch, H heads, S positions, d query-key width, v value width.
"""

import math

import torch
import triton
import triton.language as tl
from nmoe.kernels.native.attention_tiles_triton import (
    ahead_of_launch,
    describe,
    describe_inputs,
    edges,
    empty_heads,
    for_tma,
    hide,
    launch,
    load_tile,
    owned,
    reach_of,
    store_tile,
    tiles_of,
    widths_of,
)

_LOWEST = tl.constexpr(-1.0e30)
"""Below every score, and finite: its difference from itself is 0."""


@triton.jit(do_not_specialize=["heads", "length", "window"])
def _window_attention_kernel(
    q,
    q_rest,
    k,
    k_rest,
    v,
    out,
    level_ptr,
    heads,
    length,
    window,
    exponent,
    edge_ptr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    REST: tl.constexpr,
    VALUE: tl.constexpr,
):
    batch, head, query = owned(heads, length, QUERIES, True)
    q_tile = load_tile(q, batch, head, query, 0, QUERIES, WIDTH)
    if REST:
        q_rest_tile = load_tile(q_rest, batch, head, query, WIDTH, QUERIES, REST)
    ahead = tl.arange(0, QUERIES)[:, None] - tl.arange(0, KEYS)[None, :]
    top = tl.full((QUERIES,), _LOWEST, tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    sums = tl.zeros((QUERIES, VALUE), tl.float32)
    first, corner, reach = tl.maximum(query - window + 1, 0), window, window
    if edge_ptr is not None:
        lowest, highest, reach = edges(edge_ptr, batch, query, length, window, QUERIES)
        first, corner = tl.maximum(first, lowest), tl.minimum(query + QUERIES - highest, window)
    for key in tl.range(first // KEYS * KEYS, tl.minimum(query + QUERIES, length), KEYS):
        start = hide(tl.zeros((QUERIES, KEYS), tl.float32), ahead, query, key, corner, reach, QUERIES, KEYS)
        k_tile = load_tile(k, batch, head, key, 0, KEYS, WIDTH)
        score = tl.dot(q_tile, k_tile.T, start)
        if REST:
            k_rest_tile = load_tile(k_rest, batch, head, key, WIDTH, KEYS, REST)
            score = tl.dot(q_rest_tile, k_rest_tile.T, score)
        new_top = tl.maximum(top, tl.max(score, 1))
        weight = tl.exp2(score * exponent - (new_top * exponent)[:, None])
        decay = tl.exp2((top - new_top) * exponent)
        total = total * decay + tl.sum(weight, 1)
        v_tile = load_tile(v, batch, head, key, 0, KEYS, VALUE)
        sums = tl.dot(weight.to(tl.bfloat16), v_tile, sums * decay[:, None])
        top = new_top
    store_tile(out, batch, head, query, 0, sums / total[:, None])
    row = query + tl.arange(0, QUERIES)
    level_at = level_ptr + (batch * heads + head).to(tl.int64) * length + row
    tl.store(level_at, top + tl.log2(total) / exponent, mask=row < length)


def forward(
    q_BHSd: torch.Tensor,
    k_BHSd: torch.Tensor,
    v_BHSv: torch.Tensor,
    scale: float,
    window: int,
    document_start_BS: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `attention_forward_cuda.forward`, on any GPU, and in Triton's interpreter."""
    width, value = q_BHSd.shape[3], v_BHSv.shape[3]
    out_BHSv = empty_heads(q_BHSd, value)
    level_BHS = q_BHSd.new_empty(q_BHSd.shape[:3], dtype=torch.float32)
    if level_BHS.numel() == 0:
        return out_BHSv, level_BHS
    q_BHSd, k_BHSd, v_BHSv = for_tma(q_BHSd), for_tma(k_BHSd), for_tma(v_BHSv)
    reach, widths = reach_of(window, document_start_BS is not None), widths_of(width, value)
    tile = tiles_of(width, value, reach, q_BHSd.device).forward
    tensors = (
        *describe_inputs(q_BHSd, k_BHSd, v_BHSv, tile, widths),
        describe(out_BHSv, tile.queries, widths.value),
        level_BHS,
    )
    numbers = (min(window, q_BHSd.shape[2]), scale * math.log2(math.e))
    edge_BS = None if document_start_BS is None else document_start_BS.contiguous()
    launch(_window_attention_kernel, tile, widths, tensors, numbers, edge_BS, q_BHSd, tile.queries)
    return out_BHSv, level_BHS


TRITON_KERNELS = ahead_of_launch(
    "window_attention",
    __name__,
    "_window_attention_kernel",
    ("q", "q_rest", "k", "k_rest", "v", "out", "level_ptr"),
    ("exponent",),
    0,
)
"""What is compiled ahead: for the widths of the table."""
