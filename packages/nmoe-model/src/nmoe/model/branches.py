"""Sequences that begin alike, computed in one row: what they share once, and what follows as branches.

Shapes: B rows, S tokens of a row, T = B·S, Q tokens behind the trunk, H heads, d query-key width, v value width.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


@dataclass(frozen=True)
class Branches:
    """How the tokens of each row continue one another: a row is a tree of tokens, written down depth first.

    A token sees those before it in the row whose `until` lies behind it: its ancestors. Padding at a row's end is seen
    by nothing else.
    """

    position_BS: torch.Tensor
    """int64: the place of each token in its own sequence, by which RoPE turns it."""
    until_BS: torch.Tensor
    """int64: the first place in the row from which on the token is not seen any more; behind the token's own."""
    trunk: int
    """The first so many tokens of every row follow one another without a branch: place and position are the same."""
    document_start_BS: torch.Tensor | None = None
    """int32, of the trunk's tokens: see `Transformer.hidden`; of what is behind it, every document begins at 0."""
    _masks: dict[int | None, torch.Tensor] = field(default_factory=dict, repr=False, compare=False)

    def attend(
        self,
        attention: Callable[..., torch.Tensor],
        q_1HTd: torch.Tensor,
        k_1HTd: torch.Tensor,
        v_1HTv: torch.Tensor,
        *,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        """Attention of all rows' tokens, which come as one row since each row has positions of its own.

        The trunk is causal and goes to `attention`, an `Ops.attention`; what is behind it goes through a mask.

        Returns:
            (1, H, T, v).
        """
        q_BHSd, k_BHSd, v_BHSv = (self._rows(x) for x in (q_1HTd, k_1HTd, v_1HTv))
        trunk = [x[:, :, : self.trunk] for x in (q_BHSd, k_BHSd, v_BHSv)]
        out_BHSv = attention(*trunk, scale=scale, window=window, document_start_BS=self.document_start_BS)
        if self.trunk < q_BHSd.shape[2]:
            behind_BHQv = _masked(q_BHSd[:, :, self.trunk :], k_BHSd, v_BHSv, self._mask(window)[:, None], scale)
            out_BHSv = torch.cat((out_BHSv, behind_BHQv), dim=2)
        return out_BHSv.transpose(1, 2).flatten(0, 1)[None].transpose(1, 2)

    def _rows(self, x_1HTd: torch.Tensor) -> torch.Tensor:
        return x_1HTd[0].transpose(0, 1).unflatten(0, self.position_BS.shape).transpose(1, 2)

    def _mask(self, window: int | None) -> torch.Tensor:
        """bool (B, Q, S): which tokens each of those behind the trunk sees. Made once for all layers of a kind."""
        if window not in self._masks:
            place_S = torch.arange(self.until_BS.shape[1], device=self.until_BS.device)
            place_Q1 = place_S[self.trunk :, None]
            mask_BQS = (place_S <= place_Q1) & (place_Q1 < self.until_BS[:, None])
            if window is not None:
                mask_BQS &= self.position_BS[:, self.trunk :, None] - self.position_BS[:, None] < window
            self._masks[window] = mask_BQS
        return self._masks[window]


def _masked(
    q_BHQd: torch.Tensor, k_BHSd: torch.Tensor, v_BHSv: torch.Tensor, mask_B1QS: torch.Tensor, scale: float
) -> torch.Tensor:
    """PyTorch's attention, values padded to the keys' width: its fused kernels know one width only."""
    width = v_BHSv.shape[-1]
    wide_BHSd = F.pad(v_BHSv, (0, max(0, k_BHSd.shape[-1] - width)))
    # Not cuDNN, where there is a choice: it would plan each shape anew, and hardly two batches have the same.
    choice = sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]) if q_BHQd.is_cuda else nullcontext()
    with choice:
        out_BHQd = F.scaled_dot_product_attention(q_BHQd, k_BHSd, wide_BHSd, attn_mask=mask_B1QS, scale=scale)
    return out_BHQd[..., :width]
