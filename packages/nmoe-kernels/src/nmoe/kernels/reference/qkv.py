"""Queries, keys and values of plain attention, put together from the one product that projects all three.

Shapes: B batch, S positions, H heads, d head width.
"""

import torch
from nmoe.kernels.errors import ShapeError
from nmoe.kernels.reference.norm import rms_norm
from nmoe.kernels.reference.rope import apply_rope

Gains = tuple[torch.Tensor, torch.Tensor]
"""Of the queries' norm and of the keys', each (d)."""


def check_qkv_shapes(qkv_BS3Hd: torch.Tensor, gains: Gains | None, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Refuses shapes that do not belong together.

    Raises:
        ShapeError: with what was expected and found.
    """
    if qkv_BS3Hd.dim() == 5:
        _, length, three, heads, width = qkv_BS3Hd.shape
        if (
            three == 3
            and heads > 0
            and width > 0
            and width % 2 == 0
            and cos.shape == sin.shape == (length, width // 2)
            and all(gain.shape == (width,) for gain in gains or ())
        ):
            return
    raise ShapeError(
        "expected qkv (B, S, 3, H, d), gains (d) or none, cos and sin (S, d/2), d even; found "
        f"{', '.join(str(tuple(tensor.shape)) for tensor in (qkv_BS3Hd, *(gains or ()), cos, sin))}: "
        "use the widths of one layer"
    )


def qkv_heads(
    qkv_BS3Hd: torch.Tensor, gains: Gains | None, eps: float, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `attention` takes: each query and key after its RMSNorm, if there is one, and RoPE.

    Args:
        qkv_BS3Hd: as projected; queries, keys, values.
        gains: of the norms over a head; None: queries and keys are not normed.
        eps: of the norms.
        cos: (S, d/2).
        sin: (S, d/2).

    Returns:
        q, k and v, each (B, H, S, d), the last a view.

    Raises:
        ShapeError: the shapes do not belong together.
    """
    check_qkv_shapes(qkv_BS3Hd, gains, cos, sin)
    q_BSHd, k_BSHd, v_BSHd = qkv_BS3Hd.unbind(2)  # not by index: gradients would be put together by additions
    if gains is not None:
        q_BSHd, k_BSHd = rms_norm(q_BSHd, gains[0], eps), rms_norm(k_BSHd, gains[1], eps)
    q_BHSd, k_BHSd = (apply_rope(x.transpose(1, 2), cos, sin) for x in (q_BSHd, k_BSHd))
    return q_BHSd, k_BHSd, v_BSHd.transpose(1, 2)
