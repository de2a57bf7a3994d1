"""The two kernels of causal attention's backward, under a window or none, within documents or whole samples,
deterministic to the bit.

Scores are computed in both, seven products in place of five: so neither waits for the other's sums, and no sum is made
in the order of the day.

The first goes before the second, which reads what it leaves: each query's sum of output times its gradient.

Source: FlashAttention-2 (arXiv:2307.08691), algorithm 2; the two passes are ours.
"""

import math

import torch
import triton
import triton.language as tl
from nmoe.kernels.native.attention_tiles_triton import (
    ahead_of_launch,
    describe,
    describe_inputs,
    describe_parts,
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


@triton.jit(do_not_specialize=["heads", "length", "window"])
def _dq_kernel(
    q,
    q_rest,
    k,
    k_rest,
    v,
    out,
    dout,
    dq,
    dq_rest,
    level_ptr,
    delta_ptr,
    heads,
    length,
    window,
    exponent,
    scale,
    edge_ptr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    REST: tl.constexpr,
    VALUE: tl.constexpr,
):
    batch, head, query = owned(heads, length, QUERIES, True)
    row = query + tl.arange(0, QUERIES)
    place = (batch * heads + head).to(tl.int64) * length + row
    out_tile = load_tile(out, batch, head, query, 0, QUERIES, VALUE)
    dout_tile = load_tile(dout, batch, head, query, 0, QUERIES, VALUE)
    delta = tl.sum(out_tile.to(tl.float32) * dout_tile.to(tl.float32), 1)
    tl.store(delta_ptr + place, delta, mask=row < length)
    level = tl.load(level_ptr + place, mask=row < length, other=0.0)
    q_tile = load_tile(q, batch, head, query, 0, QUERIES, WIDTH)
    sums = tl.zeros((QUERIES, WIDTH), tl.float32)
    if REST:
        q_rest_tile = load_tile(q_rest, batch, head, query, WIDTH, QUERIES, REST)
        sums_rest = tl.zeros((QUERIES, REST), tl.float32)
    ahead = tl.arange(0, QUERIES)[:, None] - tl.arange(0, KEYS)[None, :]
    first, corner, reach = tl.maximum(query - window + 1, 0), window, window
    if edge_ptr is not None:
        lowest, highest, reach = edges(edge_ptr, batch, query, length, window, QUERIES)
        first, corner = tl.maximum(first, lowest), tl.minimum(query + QUERIES - highest, window)
    for key in tl.range(first // KEYS * KEYS, tl.minimum(query + QUERIES, length), KEYS):
        k_tile = load_tile(k, batch, head, key, 0, KEYS, WIDTH)
        v_tile = load_tile(v, batch, head, key, 0, KEYS, VALUE)
        start = tl.broadcast_to(-level[:, None], QUERIES, KEYS)
        start = hide(start, ahead, query, key, corner, reach, QUERIES, KEYS)
        score = tl.dot(q_tile, k_tile.T, start)
        if REST:
            k_rest_tile = load_tile(k_rest, batch, head, key, WIDTH, KEYS, REST)
            score = tl.dot(q_rest_tile, k_rest_tile.T, score)
        dweight = tl.dot(dout_tile, v_tile.T)
        weight = tl.exp2(score * exponent)
        dscore = (weight * (dweight - delta[:, None])).to(tl.bfloat16)
        sums = tl.dot(dscore, k_tile, sums)
        if REST:
            sums_rest = tl.dot(dscore, k_rest_tile, sums_rest)
    store_tile(dq, batch, head, query, 0, sums * scale)
    if REST:
        store_tile(dq_rest, batch, head, query, WIDTH, sums_rest * scale)


@triton.jit(do_not_specialize=["heads", "length", "window"])
def _dkdv_kernel(
    q,
    q_rest,
    k,
    k_rest,
    v,
    dout,
    dk,
    dk_rest,
    dv,
    level_ptr,
    delta_ptr,
    heads,
    length,
    window,
    exponent,
    scale,
    edge_ptr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    REST: tl.constexpr,
    VALUE: tl.constexpr,
):
    batch, head, key = owned(heads, length, KEYS, False)
    k_tile = load_tile(k, batch, head, key, 0, KEYS, WIDTH)
    v_tile = load_tile(v, batch, head, key, 0, KEYS, VALUE)
    dk_sums = tl.zeros((KEYS, WIDTH), tl.float32)
    dv_sums = tl.zeros((KEYS, VALUE), tl.float32)
    if REST:
        k_rest_tile = load_tile(k_rest, batch, head, key, WIDTH, KEYS, REST)
        rest_sums = tl.zeros((KEYS, REST), tl.float32)
    ahead = tl.arange(0, QUERIES)[None, :] - tl.arange(0, KEYS)[:, None]
    place = (batch * heads + head).to(tl.int64) * length
    stop, corner, reach = tl.minimum(key + KEYS - 1 + window, length), window, window
    if edge_ptr is not None:
        lowest, highest, reach = edges(edge_ptr, batch, key, length, window, KEYS)
        stop, corner = tl.minimum(stop, highest + 1), tl.minimum(lowest + 1 - key, window)
    for query in tl.range(key, stop, QUERIES):
        row = query + tl.arange(0, QUERIES)
        level = tl.load(level_ptr + place + row, mask=row < length, other=float("inf"))  # weights of 0 beyond the last
        delta = tl.load(delta_ptr + place + row, mask=row < length, other=0.0)
        q_tile = load_tile(q, batch, head, query, 0, QUERIES, WIDTH)
        dout_tile = load_tile(dout, batch, head, query, 0, QUERIES, VALUE)
        start = tl.broadcast_to(-level[None, :], KEYS, QUERIES)
        start = hide(start, ahead, query, key, corner, reach, QUERIES, KEYS)
        score = tl.dot(k_tile, q_tile.T, start)
        if REST:
            q_rest_tile = load_tile(q_rest, batch, head, query, WIDTH, QUERIES, REST)
            score = tl.dot(k_rest_tile, q_rest_tile.T, score)
        dweight = tl.dot(v_tile, dout_tile.T, tl.broadcast_to(-delta[None, :], KEYS, QUERIES))
        weight = tl.exp2(score * exponent)
        dv_sums = tl.dot(weight.to(tl.bfloat16), dout_tile, dv_sums)
        dscore = (weight * dweight).to(tl.bfloat16)
        dk_sums = tl.dot(dscore, q_tile, dk_sums)
        if REST:
            rest_sums = tl.dot(dscore, q_rest_tile, rest_sums)
    store_tile(dv, batch, head, key, 0, dv_sums)
    store_tile(dk, batch, head, key, 0, dk_sums * scale)
    if REST:
        store_tile(dk_rest, batch, head, key, WIDTH, rest_sums * scale)


def attention_gradients(
    dout_BHSv: torch.Tensor,
    q_BHSd: torch.Tensor,
    k_BHSd: torch.Tensor,
    v_BHSv: torch.Tensor,
    out_BHSv: torch.Tensor,
    level_BHS: torch.Tensor,
    scale: float,
    window: int,
    document_start_BS: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of queries, keys and values.

    Args:
        dout_BHSv: bf16, of the output, with any strides.
        q_BHSd: as forward.
        k_BHSd: as forward.
        v_BHSv: as forward.
        out_BHSv: that forward gave.
        level_BHS: fp32, that forward gave: the score, without scale, at which a key's weight would be 1.
        scale: as forward.
        window: as forward.
        document_start_BS: as forward.

    Returns:
        bf16, each a (B, H, S, ·) view of memory in the order (B, S, H, ·).
    """
    dq_BHSd, dk_BHSd, dv_BHSv = (empty_heads(tensor, tensor.shape[3]) for tensor in (q_BHSd, k_BHSd, v_BHSv))
    if q_BHSd.numel() == 0:
        return dq_BHSd, dk_BHSd, dv_BHSv
    dout_BHSv, q_BHSd, k_BHSd, v_BHSv, out_BHSv = map(for_tma, (dout_BHSv, q_BHSd, k_BHSd, v_BHSv, out_BHSv))
    width, value = q_BHSd.shape[3], v_BHSv.shape[3]
    reach, widths = reach_of(window, document_start_BS is not None), widths_of(width, value)
    tiles = tiles_of(width, value, reach, q_BHSd.device)
    numbers = (min(window, q_BHSd.shape[2]), scale * math.log2(math.e), scale)
    delta_BHS = torch.empty_like(level_BHS)
    start_BS = last_BS = None
    if document_start_BS is not None:
        start_BS = document_start_BS.contiguous()
        last_BS = last_queries(start_BS)

    tile = tiles.dq
    tensors = (
        *describe_inputs(q_BHSd, k_BHSd, v_BHSv, tile, widths),
        describe(out_BHSv, tile.queries, widths.value),
        describe(dout_BHSv, tile.queries, widths.value),
        *describe_parts(dq_BHSd, tile.queries, widths),
        level_BHS,
        delta_BHS,
    )
    launch(_dq_kernel, tile, widths, tensors, numbers, start_BS, q_BHSd, tile.queries)

    tile = tiles.dkdv
    tensors = (
        *describe_inputs(q_BHSd, k_BHSd, v_BHSv, tile, widths),
        describe(dout_BHSv, tile.queries, widths.value),
        *describe_parts(dk_BHSd, tile.keys, widths),
        describe(dv_BHSv, tile.keys, widths.value),
        level_BHS,
        delta_BHS,
    )
    launch(_dkdv_kernel, tile, widths, tensors, numbers, last_BS, q_BHSd, tile.keys)
    return dq_BHSd, dk_BHSd, dv_BHSv


def last_queries(document_start_BS: torch.Tensor) -> torch.Tensor:
    """For each key the last query that may see it, were there no window: what starts at most at the key is a prefix of
    the queries. int32; the host waits for nothing."""
    position_S = torch.arange(document_start_BS.shape[1], dtype=torch.int32, device=document_start_BS.device)
    position_BS = position_S.expand_as(document_start_BS).contiguous()
    return torch.searchsorted(document_start_BS, position_BS, right=True, out_int32=True).sub_(1)


_TENSORS = ("q", "q_rest", "k", "k_rest", "v")
_NUMBERS = ("level_ptr", "delta_ptr")

TRITON_KERNELS = (
    *ahead_of_launch(
        "attention_dq",
        __name__,
        "_dq_kernel",
        (*_TENSORS, "out", "dout", "dq", "dq_rest", *_NUMBERS),
        ("exponent", "scale"),
        1,
    ),
    *ahead_of_launch(
        "attention_dkdv",
        __name__,
        "_dkdv_kernel",
        (*_TENSORS, "dout", "dk", "dk_rest", "dv", *_NUMBERS),
        ("exponent", "scale"),
        2,
    ),
)
"""What is compiled ahead: for the widths of the table."""
