"""Where text comes from: files here or on a server, or a Hugging Face dataset, as one ordered stream of blocks."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from nmoe.data.blocks import Cut, Position
from nmoe.data.errors import ArgumentError
from nmoe.data.files import FileKind, find_files, open_file
from nmoe.data.readers import read_blocks
from nmoe.data.remote import Patience

SourceKind = Literal["hf", "parquet", "jsonl", "text"]
SOURCE_KINDS: tuple[SourceKind, ...] = ("hf", "parquet", "jsonl", "text")
_NAMES = 16


class Source(ABC):
    """Documents in one fixed order, read as often as wanted, from any position that was given before."""

    total: int | None = None
    """Bytes to read in all, where known; `Cut.read` counts towards it."""

    @abstractmethod
    def blocks(self, start: Position | None = None) -> Iterator[Cut]:
        """The blocks from `start` on, which is the `after` of an earlier cut; None: from the beginning.

        Which documents come, and in which order, depends on neither. Raises SourceError, and NetworkError.
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What a manifest keeps of the source (JSON values, no paths)."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What must be the same for reading to go on where it stopped (JSON values)."""

    @abstractmethod
    def __str__(self) -> str:
        """In a few words, for people."""

    def __iter__(self) -> Iterator[str]:
        """The documents, empty ones left out."""
        for cut in self.blocks():
            yield from cut.block.documents()


def open_source(
    kind: SourceKind | None,
    inputs: Sequence[str | Path],
    *,
    text_key: str = "text",
    config: str | None = None,
    split: str = "train",
    revision: str | None = None,
    patience: Patience | None = None,
) -> Source:
    """The source that a user names.

    `parquet`, `jsonl`, `text`: files, folders, globs and http(s) addresses; None tells files apart by suffix. JSONL and
    text may be packed (`.gz`, `.zst`). A line of JSONL or a row of Parquet is a document: the string under `text_key`.
    A text file is cut at the first blank line after each 65,536 characters, after 1,048,576 in any case; together the
    pieces are the file. `hf`: one dataset's name, or its folder, streamed, of which `text_key` is the column;
    `config`, `split` and `revision` are for it alone. `patience` says what is done about network trouble.

    Raises ArgumentError, SourceError for what is missing or of another kind, and NetworkError.
    """
    names = [str(each) for each in inputs]
    patience = patience or Patience()
    if not names:
        raise ArgumentError("input", expected="at least one", found="none", remedy="Name files, folders or a dataset.")
    if kind is not None and kind not in SOURCE_KINDS:
        choices = ", ".join(SOURCE_KINDS)
        raise ArgumentError("source", expected=f"one of {choices}", found=repr(kind), remedy="Choose one.")
    if kind == "hf":
        from nmoe.data.hub import HubSource

        if len(names) > 1:
            remedy = "Prepare each into an output of its own."
            raise ArgumentError("input", expected="one dataset", found=f"{len(names)} names", remedy=remedy)
        return HubSource(names[0], text_key=text_key, config=config, split=split, revision=revision, patience=patience)
    for name, value, default in (("config", config, None), ("split", split, "train"), ("revision", revision, None)):
        if value != default:
            remedy = "Leave it out, or read a Hugging Face dataset (--source hf)."
            raise ArgumentError(name, expected="nothing: files have none", found=repr(value), remedy=remedy)
    return FileSource(kind, names, text_key, patience)


class FileSource(Source):
    """Text, JSONL and Parquet files, one after the other; holds a block of a file at once."""

    def __init__(self, kind: FileKind | None, inputs: Sequence[str], text_key: str, patience: Patience) -> None:
        self.files = find_files(kind, inputs, patience)
        """The files, in reading order."""
        self._text_key = text_key
        self._patience = patience
        sizes = [file.size for file in self.files]
        self.total = None if None in sizes else sum(size for size in sizes if size is not None)

    def blocks(self, start: Position | None = None) -> Iterator[Cut]:
        """The blocks from `start` on."""
        place = start or {"file": 0, "within": {}}
        before = sum(file.size or 0 for file in self.files[: place["file"]])
        for number, file in enumerate(self.files[place["file"] :], place["file"]):
            within = place["within"] if number == place["file"] else {}
            with open_file(file, self._patience) as opened:
                for cut in read_blocks(file, opened, within, self._text_key):
                    yield Cut(cut.block, {"file": number, "within": cut.after}, before + cut.read)
            before += file.size or 0

    def describe(self) -> dict[str, Any]:
        """The files' kinds, number, size in bytes and first few names."""
        kinds = sorted({file.kind for file in self.files})
        described: dict[str, Any] = {
            "kind": kinds[0] if len(kinds) == 1 else "files",
            "files": len(self.files),
            "bytes": self.total,
            "first": [file.short_name for file in self.files[:_NAMES]],
        }
        return described | ({} if kinds == ["text"] else {"text_key": self._text_key})

    def __str__(self) -> str:
        count = f"{len(self.files):,} file{'s' if len(self.files) > 1 else ''}"
        return count if self.total is None else f"{count} of {self.total / 2**20:,.1f} MiB"

    def identity(self) -> dict[str, Any]:
        """The files' names, and a digest of names, sizes and times of change."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(repr((file.short_name, file.kind, file.size, file.mark)).encode())
        return {
            "files": f"{len(self.files)} files, {self.total} bytes",
            "names, sizes and times of the files": digest.hexdigest()[:16],
            "text key": self._text_key,
        }
