"""Reading tensors from a folder's safetensors files: whole ones, ranges of them, and those stored in pieces."""

from collections.abc import Mapping
from contextlib import ExitStack
from math import prod
from pathlib import Path
from typing import Any

import torch
from nmoe.model.errors import CorruptCheckpointError
from nmoe.model.tensor_file import DTYPES
from nmoe.model.tensor_pieces import layout_problem, piece_key
from safetensors import SafetensorError, safe_open


class StoredTensors:
    """The tensor files of a folder, opened when first read, and closed with the block.

    What was read outlives it: its memory is a private mapping of the file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stack = ExitStack()
        self._open: dict[str, Any] = {}

    def __enter__(self) -> "StoredTensors":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def read_range(self, name: str, entry: Mapping[str, Any], start: int, stop: int) -> torch.Tensor:
        """The elements `start` to `stop - 1` of a flattened tensor, which it has; 1-D.

        Args:
            name: Of the tensor.
            entry: Its entry in the manifest.
            start: The first element.
            stop: One past the last.

        Raises:
            CorruptCheckpointError: a file no longer holds it as the manifest says.
        """
        pieces = _pieces(entry)
        # A range without elements is read from any piece: it has a dtype.
        touched = [piece for piece in pieces if piece["start"] < stop and start < _stop(piece)] or pieces[:1]
        found = []
        for piece in touched:
            first, last = max(start, piece["start"]), min(stop, _stop(piece))
            found.append(self._read(name, entry, piece)[first - piece["start"] : last - piece["start"]])
        if len(found) == 1:
            return found[0]
        # As bytes: not every dtype can be concatenated.
        return torch.cat([part.view(torch.uint8) for part in found]).view(found[0].dtype)

    def _read(self, name: str, entry: Mapping[str, Any], piece: Mapping[str, Any]) -> torch.Tensor:
        file, shape = piece["file"], entry["shape"]
        key = piece_key(name, shape, piece["start"], piece["elements"])
        try:
            if file not in self._open:
                self._open[file] = self._stack.enter_context(safe_open(self.folder / file, framework="pt"))
            tensor: torch.Tensor = self._open[file].get_tensor(key)
        except (SafetensorError, OSError) as error:
            problem = f"expected a safetensors file, found: {error}"
            raise CorruptCheckpointError(self.folder, file, problem) from error
        expected = entry["dtype"], shape if piece["elements"] == prod(shape) else [piece["elements"]]
        seen = DTYPES.get(tensor.dtype), list(tensor.shape)
        if seen != expected:
            raise CorruptCheckpointError(self.folder, file, f"expected tensor {key!r} as {expected}, found {seen}")
        return tensor.reshape(-1)


def check_entry(folder: Path, manifest: str, name: str, entry: Mapping[str, Any]) -> None:
    """Raises CorruptCheckpointError if a tensor's pieces are not each of its elements once."""
    problem = layout_problem(entry["shape"], [(piece["start"], _stop(piece)) for piece in _pieces(entry)])
    if problem is not None:
        raise CorruptCheckpointError(folder, manifest, f"tensor {name!r}: {problem}")


def _pieces(entry: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A tensor's pieces as the manifest has them, by start; a whole one is one."""
    if "pieces" in entry:
        return sorted(entry["pieces"], key=lambda piece: piece["start"])
    return [{"file": entry["file"], "start": 0, "elements": prod(entry["shape"])}]


def _stop(piece: Mapping[str, Any]) -> int:
    return int(piece["start"] + piece["elements"])
