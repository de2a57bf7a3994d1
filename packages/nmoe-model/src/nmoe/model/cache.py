"""What generation keeps of earlier positions: MLA's latents, or plain attention's keys and values."""

import torch


class LayerCache:
    """Two tensors of one layer that grow along the sequence, in room taken once.

    MLA keeps the normalised key-value latent (B, L, kv_lora_rank) and the shared RoPE key (B, L, qk_rope_head_dim);
    plain attention keeps keys and values (B, L, H, head_dim).
    """

    def __init__(self, max_len: int) -> None:
        self.max_len, self.length = max_len, 0
        self._room: tuple[torch.Tensor, torch.Tensor] | None = None

    def append(self, first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds new positions (along dimension 1) and returns both tensors for all positions so far."""
        if self._room is None:
            self._room = (self._empty(first), self._empty(second))
        end = self.length + first.shape[1]
        for room, new in zip(self._room, (first, second), strict=True):
            room[:, self.length : end] = new
        self.length = end
        return self._room[0][:, :end], self._room[1][:, :end]

    def _empty(self, like: torch.Tensor) -> torch.Tensor:
        return like.new_empty(like.shape[0], self.max_len, *like.shape[2:])


class Cache:
    """One `LayerCache` a trunk layer."""

    def __init__(self, n_layers: int, max_len: int) -> None:
        self.layers = [LayerCache(max_len) for _ in range(n_layers)]

    @property
    def length(self) -> int:
        """Positions held."""
        return self.layers[0].length
