"""Queries, keys and values of multi-head latent attention (arXiv:2405.04434, section 2.1), put together from what the
projections give.

Shapes: B batch, S positions, H heads, n width without position, r RoPE width, v value width; d = n + r, x = n + v.
"""

import torch
from nmoe.kernels.errors import ShapeError
from nmoe.kernels.reference.rope import apply_rope


def check_mla_shapes(
    q_BSHd: torch.Tensor, kv_BSHx: torch.Tensor, k_rope_BSr: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> None:
    """Refuses shapes that do not belong together.

    Raises:
        ShapeError: with what was expected and found.
    """
    tensors = (q_BSHd, kv_BSHx, k_rope_BSr, cos, sin)
    if [tensor.dim() for tensor in tensors] == [4, 4, 3, 2, 2]:
        (batch, length, heads, width), rope = q_BSHd.shape, k_rope_BSr.shape[-1]
        if (
            kv_BSHx.shape[:3] == (batch, length, heads)
            and k_rope_BSr.shape[:2] == (batch, length)
            and cos.shape == sin.shape == (length, rope // 2)
            and rope % 2 == 0
            and 0 < rope < width < kv_BSHx.shape[-1] + rope
        ):
            return
    raise ShapeError(
        "expected q (B, S, H, n + r), kv (B, S, H, n + v), k_rope (B, S, r), cos and sin (S, r/2), r even; "
        f"found {', '.join(str(tuple(tensor.shape)) for tensor in tensors)}: use the widths of one layer"
    )


def mla_heads(
    q_BSHd: torch.Tensor, kv_BSHx: torch.Tensor, k_rope_BSr: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `attention` takes: RoPE on the queries' last r, and the shared key beside each head's own.

    Args:
        q_BSHd: queries as projected.
        kv_BSHx: the latent's expansion, a head's key before its value.
        k_rope_BSr: the key that all heads share, turned already, as a cache keeps it.
        cos: (S, r/2).
        sin: (S, r/2).

    Returns:
        q (B, H, S, d), k (B, H, S, d) and v (B, H, S, v), the last a view.

    Raises:
        ShapeError: the shapes do not belong together.
    """
    check_mla_shapes(q_BSHd, kv_BSHx, k_rope_BSr, cos, sin)
    heads, rope = q_BSHd.shape[2], k_rope_BSr.shape[-1]
    nope = q_BSHd.shape[-1] - rope
    q_nope_BHSn, q_rope_BHSr = q_BSHd.transpose(1, 2).split((nope, rope), dim=-1)
    k_nope_BHSn, v_BHSv = kv_BSHx.transpose(1, 2).split((nope, kv_BSHx.shape[-1] - nope), dim=-1)
    q_BHSd = torch.cat((q_nope_BHSn, apply_rope(q_rope_BHSr, cos, sin)), dim=-1)
    k_BHSd = torch.cat((k_nope_BHSn, k_rope_BSr[:, None].expand(-1, heads, -1, -1)), dim=-1)
    return q_BHSd, k_BHSd, v_BHSv
