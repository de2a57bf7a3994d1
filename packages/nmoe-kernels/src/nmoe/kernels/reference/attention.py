"""Causal and sliding-window attention, within documents or whole samples, with value heads narrower than query-key
heads (MLA: 192 and 128).

Shapes: B batch, H heads, S sequence (queries), L keys, d query-key width, v value width, w window.
"""

from typing import Any

import torch
import torch.nn.functional as F
from nmoe.kernels.errors import ShapeError


def check_attention_shapes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None) -> None:
    """Refuses heads, lengths or a window that do not belong together.

    Raises:
        ShapeError: with what was expected and found.
    """
    if q.dim() != 4 or q.shape[:2] != k.shape[:2] or q.shape[-1] != k.shape[-1] or k.shape[:3] != v.shape[:3]:
        raise ShapeError(
            "expected q (B, H, S, d), k (B, H, L, d), v (B, H, L, v); "
            f"found {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if q.shape[2] > k.shape[2]:
        raise ShapeError(f"expected at least as many keys as queries; found {k.shape[2]} and {q.shape[2]}")
    if window is not None and window < 1:
        raise ShapeError(f"expected a window of at least 1; found {window}")


def check_document_starts(document_start_BS: torch.Tensor, q_BHSd: torch.Tensor) -> None:
    """Refuses starts that are not those of the queries. Their values are not read: they may be on a GPU.

    Raises:
        ShapeError: with what was expected and found.
    """
    expected = (q_BHSd.shape[0], q_BHSd.shape[2])
    if document_start_BS.shape != expected or document_start_BS.dtype != torch.int32:
        raise ShapeError(
            f"expected document starts of shape {expected} and torch.int32, found {tuple(document_start_BS.shape)} and "
            f"{document_start_BS.dtype}: give each query the first key of its document"
        )
    if document_start_BS.device != q_BHSd.device:
        raise ShapeError(
            f"expected document starts on {q_BHSd.device}, found {document_start_BS.device}: move them to the queries"
        )


def attention(
    q_BHSd: torch.Tensor,
    k_BHLd: torch.Tensor,
    v_BHLv: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    document_start_BS: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention; the S queries are the last S of the L positions.

    Args:
        q_BHSd: queries.
        k_BHLd: keys, L ≥ S (more keys than queries when decoding from a cache).
        v_BHLv: values.
        scale: factor on the scores before the softmax.
        window: a query sees itself and the `window - 1` positions before it; None sees all before it.
        document_start_BS: int32, for each query the first of the L positions that it may see, that of its document:
            never decreasing along S, and at most the query's own, else results are undefined. None: the first of all.

    Returns:
        (B, H, S, v).

    Raises:
        ShapeError: the tensors, the window or the starts are not as described.
    """
    check_attention_shapes(q_BHSd, k_BHLd, v_BHLv, window)
    queries, keys = q_BHSd.shape[2], k_BHLd.shape[2]
    window = keys if window is None else min(window, keys)
    if document_start_BS is not None:
        check_document_starts(document_start_BS, q_BHSd)
        if queries == keys and window * 2 <= keys:
            return blockwise_window_attention(
                q_BHSd, k_BHLd, v_BHLv, scale=scale, window=window, document_start_BS=document_start_BS
            )
        mask_SL = window_mask(queries, keys, window, q_BHSd.device)
        mask_BSL = mask_SL & (torch.arange(keys, device=q_BHSd.device) >= document_start_BS[:, :, None])
        return _sdpa(q_BHSd, k_BHLd, v_BHLv, scale=scale, attn_mask=mask_BSL[:, None])
    if queries < keys:
        return _sdpa(q_BHSd, k_BHLd, v_BHLv, scale=scale, attn_mask=window_mask(queries, keys, window, q_BHSd.device))
    if window == keys:
        return _sdpa(q_BHSd, k_BHLd, v_BHLv, scale=scale, is_causal=True)
    if window * 2 <= keys:
        return blockwise_window_attention(q_BHSd, k_BHLd, v_BHLv, scale=scale, window=window)
    return _sdpa(q_BHSd, k_BHLd, v_BHLv, scale=scale, attn_mask=window_mask(queries, keys, window, q_BHSd.device))


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
    """PyTorch's attention, values padded to the keys' width: its fused kernels know one width only."""
    width = v.shape[-1]
    if width < k.shape[-1]:
        v = F.pad(v, (0, k.shape[-1] - width))
    return F.scaled_dot_product_attention(q, k, v, **options)[..., :width]


def window_mask(queries: int, keys: int, window: int, device: torch.device) -> torch.Tensor:
    """Boolean (queries, keys), true where the query (aligned to the last key) may see the key."""
    distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    return (distance >= 0) & (distance < window)


def blockwise_window_attention(
    q_BHSd: torch.Tensor,
    k_BHSd: torch.Tensor,
    v_BHSv: torch.Tensor,
    *,
    scale: float,
    window: int,
    document_start_BS: torch.Tensor | None = None,
) -> torch.Tensor:
    """Window attention at a cost of 2·S·w instead of S²: blocks of w queries see their own and the previous block."""
    batch, length = q_BHSd.shape[0], q_BHSd.shape[2]
    blocks = -(-length // window)
    padding = blocks * window - length

    def in_blocks(x: torch.Tensor) -> torch.Tensor:
        return F.pad(x, (0, 0, 0, padding)).unflatten(2, (blocks, window))

    def with_previous(x: torch.Tensor) -> torch.Tensor:
        own = in_blocks(x)
        return torch.cat((F.pad(own, (0, 0, 0, 0, 1, 0))[:, :, :-1], own), dim=3)

    mask = window_mask(window, 2 * window, window, q_BHSd.device).expand(blocks, -1, -1).clone()
    mask[0, :, :window] = False  # the first block has no previous one: its zeros are no keys
    q = in_blocks(q_BHSd).transpose(1, 2).flatten(0, 1)
    k = with_previous(k_BHSd).transpose(1, 2).flatten(0, 1)
    v = with_previous(v_BHSv).transpose(1, 2).flatten(0, 1)
    mask = mask.repeat(batch, 1, 1)
    if document_start_BS is not None:
        start = F.pad(document_start_BS, (0, padding)).unflatten(1, (blocks, window))
        key = torch.arange(2 * window, device=start.device)
        before = window * torch.arange(-1, blocks - 1, device=start.device)  # the previous block's first position
        mask &= (key + before[:, None, None] >= start[..., None]).flatten(0, 1)
    out = _sdpa(q, k, v, scale=scale, attn_mask=mask[:, None])
    return out.unflatten(0, (batch, blocks)).transpose(1, 2).flatten(2, 3)[:, :, :length]
