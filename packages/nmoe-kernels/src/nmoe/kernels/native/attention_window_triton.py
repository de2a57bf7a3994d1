"""Causal attention to a window of keys, within documents or whole samples, forward and backward, with the same bits in
every run.

Forward, a program owns a block of queries and goes through the keys that one of them sees. Backward, one kernel does
the same for the queries' gradient, and a second goes through the queries that see a block of keys: nothing is summed
by more than one program. Documents shorten these loops, and hide what tiles at their edges have of others.

Scores, softmax and sums are fp32, operands of products bf16. Kept for the backward: the inputs, the output, and for
each query the score at which a key's weight would be 1: the logarithm of the softmax's sum, over the scale.

Sources: FlashAttention-2 (arXiv:2307.08691), algorithms 1 and 2; the mask and the two passes of the backward are ours.

Shapes: B batch, H heads, S positions, d query-key width, v value width.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from nmoe.kernels.native.attention_backward_triton import attention_gradients
from nmoe.kernels.native.attention_tiles_triton import (
    ahead_of_launch,
    check_heads,
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
from nmoe.kernels.reference.attention import check_attention_shapes, check_document_starts
from torch.autograd.function import once_differentiable

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


def window_attention(
    q_BHSd: torch.Tensor,
    k_BHSd: torch.Tensor,
    v_BHSv: torch.Tensor,
    *,
    scale: float,
    window: int,
    document_start_BS: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of each query to itself and the `window - 1` positions before it; same inputs, same bits.

    Args:
        q_BHSd: bf16 queries; d a multiple of 16 up to 192.
        k_BHSd: bf16 keys.
        v_BHSv: bf16 values; v a multiple of 16 up to 128. Rows of all three must be dense and start at multiples of 16
            bytes, or they are copied.
        scale: factor on the scores before the softmax, above 0.
        window: at least 1; S or more hides nothing.
        document_start_BS: int32, for each query the first key that it may see: never decreasing along S, and at most
            the query's position, else results are undefined (no value is read on the host). None: the sample's first.

    Returns:
        (B, H, S, v), a view of memory in the order (B, S, H, v), as the gradients are too.

    Raises:
        ShapeError: a tensor or the window is not as described; the message says how to mend it.
        KernelError: the scale is not.
    """
    check_attention_shapes(q_BHSd, k_BHSd, v_BHSv, window)
    check_heads(q_BHSd, k_BHSd, v_BHSv, scale)
    if document_start_BS is not None:
        check_document_starts(document_start_BS, q_BHSd)
    return _forward_op(q_BHSd, k_BHSd, v_BHSv, scale, window, document_start_BS)[0]


def _forward(
    q_BHSd: torch.Tensor,
    k_BHSd: torch.Tensor,
    v_BHSv: torch.Tensor,
    scale: float,
    window: int,
    document_start_BS: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    out_BHSv, level_BHS = _allocate(q_BHSd, k_BHSd, v_BHSv)
    if out_BHSv.numel() == 0:
        return out_BHSv, level_BHS
    q_BHSd, k_BHSd, v_BHSv = for_tma(q_BHSd), for_tma(k_BHSd), for_tma(v_BHSv)
    width, value = q_BHSd.shape[3], v_BHSv.shape[3]
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


def _allocate(
    q_BHSd: torch.Tensor, k_BHSd: torch.Tensor, v_BHSv: torch.Tensor, *arguments: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return empty_heads(q_BHSd, v_BHSv.shape[3]), q_BHSd.new_empty(q_BHSd.shape[:3], dtype=torch.float32)


def _allocate_gradients(dout_BHSv: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, ...]:
    return tuple(empty_heads(tensor, tensor.shape[3]) for tensor in arguments[:3])


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    *kept, ctx.scale, ctx.window, document_start_BS = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*kept, *output, document_start_BS)


@once_differentiable
def _gradient(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    if grads[0] is None:
        return (None,) * 6
    *kept, document_start_BS = ctx.saved_tensors
    return *_backward_op(grads[0], *kept, ctx.scale, ctx.window, document_start_BS), None, None, None


_LIBRARY = torch.library.Library("nmoe", "FRAGMENT")
_TENSORS, _HOW = "Tensor q, Tensor k, Tensor v", "float scale, SymInt window, Tensor? document_start"
_LIBRARY.define(f"window_attention({_TENSORS}, {_HOW}) -> (Tensor, Tensor)")
_LIBRARY.define(
    f"window_attention_backward(Tensor dout, {_TENSORS}, Tensor out, Tensor level, {_HOW}) -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.impl("window_attention", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("window_attention_backward", attention_gradients, "CompositeExplicitAutograd")
torch.library.register_fake("nmoe::window_attention", _allocate, lib=_LIBRARY)
torch.library.register_fake("nmoe::window_attention_backward", _allocate_gradients, lib=_LIBRARY)
torch.library.register_autograd("nmoe::window_attention", _gradient, setup_context=_keep_for_backward, lib=_LIBRARY)
_forward_op = torch.ops.nmoe.window_attention.default
_backward_op = torch.ops.nmoe.window_attention_backward.default

TRITON_KERNELS = ahead_of_launch(
    "window_attention",
    __name__,
    "_window_attention_kernel",
    ("q", "q_rest", "k", "k_rest", "v", "out", "level_ptr"),
    ("exponent",),
    0,
)
"""What is compiled ahead: for the widths of the table."""
