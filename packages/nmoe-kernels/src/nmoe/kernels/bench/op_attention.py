"""Cases of attention: global beside cuDNN's, windowed or in documents beside compiled FlexAttention.

Shapes: B batch, H heads, S positions, d query-key width, v value width, w window.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from nmoe.kernels.bench.op_case import BF16, FP32, INT32, Case, Make, Peer, Run, Setting, Work, backward

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def attention(
    batch: int,
    heads: int,
    length: int,
    width: int,
    value: int,
    window: int | None = None,
    mean_document: int | None = None,
) -> list[Case]:
    """Forward and backward, inputs and gradients in memory as (B, S, H, ·), as a model's projections leave them; with
    `mean_document`, samples are packed of documents of that many positions on average."""
    sizes = (batch, heads, length, width, value)
    op = "document_attention" if mean_document else "attention" if window is None else "window_attention"
    shape = f"{batch}x{heads}x{length}x{width},{value}" + ("" if window is None else f" w{window}")
    if mean_document is None:
        start_BS, pairs = None, batch * (length * length // 2 if window is None else visible_pairs(length, window))
    else:
        shape += f" documents of {mean_document}"
        start_BS = document_starts(batch, length, mean_document)
        pairs = visible_pairs_in_documents(start_BS, window)
    has_cudnn = window is None and start_BS is None

    def ours(setting: Setting) -> Attend:
        starts = None if start_BS is None else start_BS.to(setting.device)
        return lambda q, k, v: setting.ops.attention(
            q, k, v, scale=width**-0.5, window=window, document_start_BS=starts
        )

    def peers(setting: Setting) -> Attend:
        if start_BS is not None:
            mask = _document_mask(batch, length, window, mean_document, setting.device)
            return lambda q, k, v: _compiled_flex()(q, k, v, block_mask=mask, scale=width**-0.5)
        return _cudnn(width) if window is None else _flex(length, window, width, setting.device)

    def peer(part: str) -> Peer:
        make = _make(peers, sizes, part)
        return Peer("cuDNN", make) if has_cudnn else Peer("FlexAttention", _compiled_again(make))

    def work(part: str) -> Work:
        known = attention_work(*sizes, pairs, part)
        return known if start_BS is None else Work(known.bytes + INT32 * start_BS.numel(), known.flop)

    return [
        Case(op, part, shape, work(part), _make(ours, sizes, part), peer(part), bits)
        for part, bits in (("forward", False), ("backward", True))
    ]


def attention_work(batch: int, heads: int, length: int, width: int, value: int, pairs: int, part: str) -> Work:
    """Of the pairs that the mask lets through in a head of all samples; of all positions, half the square."""
    positions = batch * heads * length
    if part == "forward":
        # q, k and v read; the output and each row's log-sum-exp written. Scores and their product with v.
        moved = BF16 * positions * (2 * width + 2 * value) + FP32 * positions
        return Work(moved, 2 * heads * pairs * (width + value))
    # q, k, v, the output, its gradient and the log-sum-exps read; dq, dk and dv written. Scores, dq and dk are d wide,
    # the probabilities' gradient and dv are v wide.
    moved = BF16 * positions * (2 * width + 3 * value + 2 * width + value) + FP32 * positions
    return Work(moved, 2 * heads * pairs * (3 * width + 2 * value))


def visible_pairs(length: int, window: int) -> int:
    """Queries times the keys that each sees: itself and up to `window - 1` before it."""
    window = min(window, length)
    return length * window - window * (window - 1) // 2


def document_starts(batch: int, length: int, mean: int) -> torch.Tensor:
    """int32 (B, S): at each position the first of its document. Any position but a sample's first begins one with a
    chance of 1 in `mean`; the same each time."""
    begins_BS = torch.rand(batch, length, generator=torch.Generator().manual_seed(0)) < 1 / mean
    return torch.where(begins_BS, torch.arange(length), 0).cummax(1).values.int()


def visible_pairs_in_documents(start_BS: torch.Tensor, window: int | None) -> int:
    """As `visible_pairs`, of all samples."""
    seen_BS = torch.arange(start_BS.shape[1]) - start_BS + 1
    return int((seen_BS if window is None else seen_BS.clamp(max=window)).sum())


def _make(attend_of: Callable[[Setting], Attend], sizes: tuple[int, int, int, int, int], part: str) -> Make:
    def make(setting: Setting) -> Run:
        batch, heads, length, width, value = sizes
        attend = attend_of(setting)

        def normal(last: int) -> torch.Tensor:
            return setting.normal(batch, length, heads, last).transpose(1, 2)

        q, k, v = (normal(last).requires_grad_() for last in (width, width, value))
        if part == "forward":
            return lambda: attend(q, k, v)
        return backward(attend(q, k, v), (q, k, v), normal(value))

    return make


def _cudnn(width: int) -> Attend:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=width**-0.5)

    return attend


def _flex(length: int, window: int, width: int, device: str) -> Attend:
    flex, mask = _compiled_flex(), _sliding_mask(length, window, device)
    return lambda q, k, v: flex(q, k, v, block_mask=mask, scale=width**-0.5)


@cache
def _compiled_flex() -> Callable[..., torch.Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


@cache
def _sliding_mask(length: int, window: int, device: str) -> Any:
    """One for forward and backward: another object of the same mask would compile anew."""
    from torch.nn.attention.flex_attention import create_block_mask

    def sees(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return (query >= key) & (query - key < window)

    return create_block_mask(sees, None, None, length, length, device=device)


@cache
def _document_mask(batch: int, length: int, window: int | None, mean: int, device: str) -> Any:
    """As `_sliding_mask`, in documents."""
    from torch.nn.attention.flex_attention import create_block_mask

    start_BS, reach = document_starts(batch, length, mean).to(device), window or length

    def sees(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return (query >= key) & (query - key < reach) & (key >= start_BS[batch, query])

    return create_block_mask(sees, batch, None, length, length, device=device)


def _compiled_again(make: Make) -> Make:
    """As `make`, whose compiled backward may run more than once."""

    def made(setting: Setting) -> Run:
        with _kept_buffers():
            run = make(setting)

        def again() -> Any:
            with _kept_buffers():
                return run()

        return again

    return made


@contextmanager
def _kept_buffers() -> Iterator[None]:
    """Compiled backwards write over what the forward kept, unless told not to; told by thread, hence one thread."""
    from torch._functorch import config

    with config.patch(donated_buffer=False), torch.autograd.set_multithreading_enabled(False):
        yield
