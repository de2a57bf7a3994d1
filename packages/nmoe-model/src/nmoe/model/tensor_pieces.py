"""Tensors in pieces: contiguous ranges of flattened tensors, held by different ranks."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

import torch
from nmoe.model.errors import InvalidEntryError
from nmoe.model.tensor_file import check_dense


@dataclass(frozen=True, eq=False)
class TensorPiece:
    """A range of the elements of a tensor, in the order of the flattened whole."""

    name: str
    """Of the whole tensor."""
    shape: tuple[int, ...]
    """Of the whole tensor."""
    start: int
    """Its first element, counted in the flattened whole."""
    tensor: torch.Tensor
    """The elements from there on, in any shape, read and filled in flattened order. It may have none."""

    def __post_init__(self) -> None:
        if self.start < 0 or self.stop > prod(self.shape):
            raise InvalidEntryError(
                f"tensor {self.name!r}: expected a piece of its {prod(self.shape)} elements (shape {self.shape}), "
                f"found one of the elements {self.start} to {self.stop - 1}: mend the piece's start or shape"
            )

    @property
    def stop(self) -> int:
        """One past its last element."""
        return self.start + self.tensor.numel()


def whole_pieces(tensors: Mapping[str, torch.Tensor], prefix: str = "") -> list[TensorPiece]:
    """Every tensor as the one piece of a tensor named `prefix + name`."""
    return [TensorPiece(prefix + name, tuple(tensor.shape), 0, tensor) for name, tensor in tensors.items()]


@dataclass(frozen=True, eq=False)
class Run:
    """Pieces of one tensor that follow each other without a gap: they are stored as one, if they have any element."""

    pieces: tuple[TensorPiece, ...]
    """By start; at least one."""

    @property
    def name(self) -> str:
        """Of the whole tensor."""
        return self.pieces[0].name

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor."""
        return tuple(self.pieces[0].shape)

    @property
    def dtype(self) -> torch.dtype:
        """Of all pieces."""
        return self.pieces[0].tensor.dtype

    @property
    def start(self) -> int:
        """Its first element, counted in the flattened whole."""
        return self.pieces[0].start

    @property
    def elements(self) -> int:
        """How many elements it has."""
        return self.pieces[-1].stop - self.start

    @property
    def is_whole(self) -> bool:
        """Whether it has all elements of its tensor."""
        return self.elements == prod(self.shape)

    @property
    def is_stored(self) -> bool:
        """Whether there is anything to store: the whole of a tensor without elements is something."""
        return self.elements > 0 or self.is_whole

    @property
    def key(self) -> str:
        """Its name in a file."""
        return piece_key(self.name, self.shape, self.start, self.elements)

    def blank(self, device: str) -> torch.Tensor:
        """An uninitialised tensor to store it from: in the shape of the whole if it is the whole, else 1-D."""
        return torch.empty(self.shape if self.is_whole else (self.elements,), dtype=self.dtype, device=device)

    def copy_to(self, buffer: torch.Tensor) -> None:
        """Copies all elements to a contiguous tensor such as `blank` gives."""
        flat = buffer.view(-1)
        for piece in self.pieces:
            flat[piece.start - self.start : piece.stop - self.start].view(piece.tensor.shape).copy_(
                piece.tensor.detach()
            )


def piece_key(name: str, shape: Iterable[int], start: int, elements: int) -> str:
    """The name in a file of `elements` elements of the tensor `name` from `start` on: the tensor's own for all."""
    return name if elements == prod(shape) else f"{name}@{start}"


def join_pieces(pieces: Iterable[TensorPiece]) -> list[Run]:
    """The pieces of one rank as few runs, at least one of each tensor, by name and start.

    Raises:
        InvalidEntryError: two pieces share an element, or disagree about their tensor's shape or dtype; or one is no
            dense tensor.
    """
    by_name: dict[str, list[TensorPiece]] = {}
    for piece in pieces:
        check_dense(piece.name, piece.tensor)
        by_name.setdefault(piece.name, []).append(piece)
    return [run for name in sorted(by_name) for run in _join(by_name[name])]


def _join(pieces: list[TensorPiece]) -> list[Run]:
    name = pieces[0].name
    kinds = {(tuple(piece.shape), piece.tensor.dtype) for piece in pieces}
    if len(kinds) > 1:
        found = " and ".join(f"{shape} {dtype}" for shape, dtype in sorted(kinds, key=str))
        raise InvalidEntryError(
            f"tensor {name!r}: expected all pieces of one shape and dtype, found {found}: "
            "give different tensors different names"
        )
    held = sorted((piece for piece in pieces if piece.tensor.numel() > 0), key=lambda piece: piece.start)
    runs: list[list[TensorPiece]] = [] if held else [pieces[:1]]
    for piece in held:
        if runs and piece.start < (reached := runs[-1][-1].stop):
            raise InvalidEntryError(
                f"tensor {name!r}: expected every element once, found elements {piece.start} to "
                f"{min(reached, piece.stop) - 1} twice: mend the pieces' starts"
            )
        if runs and piece.start == reached:
            runs[-1].append(piece)
        else:
            runs.append([piece])
    return [Run(tuple(run)) for run in runs]


def refuse_parts(runs: Iterable[Run]) -> None:
    """Raises InvalidEntryError unless the runs of one process are whole tensors: there is nobody to hold the rest."""
    runs = list(runs)
    for run in runs:
        if not run.is_whole:
            ranges = [(other.start, other.start + other.elements) for other in runs if other.name == run.name]
            raise InvalidEntryError(f"tensor {run.name!r}: {layout_problem(run.shape, ranges)}: give the whole tensor")


def layout_problem(shape: Iterable[int], ranges: Iterable[tuple[int, int]]) -> str | None:
    """Why ranges (first element, one past the last) are not each of a tensor's elements once; `None` if they are."""
    total, reached = prod(shape), 0
    for start, stop in sorted(ranges):
        if not 0 <= start <= stop <= total:
            return f"expected pieces of its {total} elements, found one of the elements {start} to {stop - 1}"
        if start == stop:
            continue
        if start < reached:
            return f"expected every element once, found elements {start} to {min(reached, stop) - 1} twice"
        if start > reached:
            return f"expected every element once, found elements {reached} to {start - 1} nowhere"
        reached = stop
    return None if reached == total else f"expected every element once, found elements {reached} to {total - 1} nowhere"
