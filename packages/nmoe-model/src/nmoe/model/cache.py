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

    def take(self, row_N: torch.Tensor) -> None:
        """See `Cache.take`."""
        if self._room is not None:
            first, second = self._room
            # Room that holds nothing yet need not be copied.
            self._room = (self._grown(first, row_N), self._grown(second, row_N))

    def _grown(self, room: torch.Tensor, row_N: torch.Tensor) -> torch.Tensor:
        taken = room.new_empty(len(row_N), *room.shape[1:])
        taken[:, : self.length] = room[:, : self.length].index_select(0, row_N)
        return taken

    def select(self, row_N: torch.Tensor) -> None:
        """See `Cache.select`."""
        if self._room is not None:
            self._room = (self._room[0].index_select(0, row_N), self._room[1].index_select(0, row_N))

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

    def take(self, row_N: torch.Tensor) -> None:
        """Makes rows `row_N` (int64) of those that there are the new ones: a row may be left out, or go on as several,
        which then share what they began with."""
        for layer in self.layers:
            layer.take(row_N)

    def select(self, row_N: torch.Tensor) -> None:
        """Row n becomes what row `row_N[n]` of the batch was: rows are dropped, repeated, or put in another order.

        Args:
            row_N: int64, on the device of what is held.
        """
        for layer in self.layers:
            layer.select(row_N)
