"""The files that a source is made of: found below folders, globs and addresses, and opened."""

import glob
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast
from urllib.parse import urlsplit

from nmoe.data.errors import DataError, SourceError
from nmoe.data.remote import Patience, RemoteFile, is_url, remote_names

FileKind = Literal["text", "jsonl", "parquet"]

_KINDS: dict[str, FileKind] = {
    ".txt": "text",
    ".md": "text",
    ".rst": "text",
    ".jsonl": "jsonl",
    ".parquet": "parquet",
}
_PACKED = {".gz": "gzip", ".zst": "zstd"}
_SUFFIXES = "{}; all but Parquet also with {}".format(", ".join(_KINDS), " or ".join(_PACKED))
_REQUESTS = 8
_BUFFER = 1 << 20


@dataclass(frozen=True)
class InputFile:
    """A file that exists, as it was when the source was opened."""

    name: str
    """Path or address, as given or found."""
    kind: FileKind
    size: int | None
    """Bytes on disk; None where a server does not tell."""
    mark: str
    """Changes when the file does: time of the last change, or the server's ETag."""

    @property
    def short_name(self) -> str:
        """The last part of the name."""
        return urlsplit(self.name).path.rpartition("/")[2] if is_url(self.name) else Path(self.name).name


@dataclass(frozen=True)
class Opened:
    """A file that is being read."""

    content: BinaryIO
    """Decompressed; where the file is packed, it only goes forward."""
    raw: BinaryIO
    """As it lies on disk; its `tell` is how much of it was read."""
    packed: bool


def find_files(kind: FileKind | None, inputs: Sequence[str | Path], patience: Patience) -> list[InputFile]:
    """The files that `inputs` stand for, in reading order.

    A folder stands for the files below it, a glob for the files that it matches and for those below a folder that it
    matches and that has one of the suffixes (`a.parquet/`); each sorted by path, hidden ones left out.
    `kind` None: by suffix. With a kind, a file that is named may have any suffix. Raises SourceError for what is
    missing or of another kind, NetworkError.
    """
    names = [name for each in inputs for name in _expand(str(each), kind, patience)]
    files = [(name, _kind_of(name, kind)) for name in names]
    with ThreadPoolExecutor(_REQUESTS) as pool:
        return list(pool.map(lambda file: _look(file[0], file[1], patience), files))


@contextmanager
def open_file(file: InputFile, patience: Patience) -> Iterator[Opened]:
    """Open for reading, unpacked by suffix. Raises SourceError, here and from the block, for what fails."""
    raw: BinaryIO
    try:
        if is_url(file.name):
            raw = cast(BinaryIO, io.BufferedReader(RemoteFile(file.name, patience), _BUFFER))
        else:
            raw = open(file.name, "rb", buffering=_BUFFER)  # noqa: SIM115 - closed below
        with raw:
            codec = _codec(file.name) if file.kind != "parquet" else None
            if codec is None:
                yield Opened(raw, raw, packed=False)
            else:
                yield Opened(cast(BinaryIO, _unpack(raw, codec)), raw, packed=True)
    except DataError:
        raise
    except OSError as error:
        raise _unreadable(file.name, error) from error


def _unreadable(name: str, error: OSError) -> SourceError:
    remedy = "Check the path, its rights and the disk."
    return SourceError(name, expected="a file that can be read", found=str(error), remedy=remedy)


def _unpack(raw: BinaryIO, codec: str) -> Any:
    import pyarrow

    return pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), codec)


def _look(name: str, kind: FileKind, patience: Patience) -> InputFile:
    if is_url(name):
        with RemoteFile(name, patience) as remote:
            return InputFile(name, kind, remote.stat.size, remote.stat.mark)
    try:
        stat = os.stat(name)
    except OSError as error:
        raise _unreadable(name, error) from error
    return InputFile(name, kind, stat.st_size, str(stat.st_mtime_ns))


def _expand(name: str, kind: FileKind | None, patience: Patience) -> list[str]:
    if is_url(name):
        return remote_names(name, patience) if glob.has_magic(name.rpartition("/")[2].partition("?")[0]) else [name]
    path = Path(name)
    if path.is_dir():
        return _chosen(name, _below(path), kind)
    if path.exists():
        return [name]
    if glob.has_magic(name):
        matches = [Path(match) for match in glob.glob(name, recursive=True)]
        folders = [match for match in matches if _suffix_kind(match.name) and match.is_dir()]
        below = {file for folder in folders for file in _below(folder) if _suffix_kind(file.name)}
        # A set: with `**` the files below a folder match too.
        return _chosen(name, {*matches, *below}, kind, named=True)
    raise SourceError(name, expected="a file or a folder", found="nothing", remedy="Check the path.")


def _below(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        if not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield path


def _chosen(what: str, paths: Iterable[Path], kind: FileKind | None, *, named: bool = False) -> list[str]:
    def fits(path: Path) -> bool:
        found = _suffix_kind(path.name)
        return kind in (None, found) if found is not None else named and kind is not None

    # A link to nowhere stays: it is told when the file is looked at.
    files = sorted(path for path in paths if fits(path) and not path.is_dir())
    if not files:
        wanted = f"{kind} files" if kind else f"files ({_SUFFIXES})"
        raise SourceError(what, expected=wanted, found="none", remedy="Give another path.")
    return [str(file) for file in files]


def _kind_of(name: str, kind: FileKind | None) -> FileKind:
    found = kind or _suffix_kind(urlsplit(name).path if is_url(name) else name)
    if found is None:
        remedy = "Name the kind (--source), convert the file or rename it."
        raise SourceError(name, expected=f"one of {_SUFFIXES}", found=repr(Path(name).name), remedy=remedy)
    return found


def _codec(name: str) -> str | None:
    path = urlsplit(name).path if is_url(name) else name
    return _PACKED.get(Path(path).suffix.lower())


def _suffix_kind(name: str) -> FileKind | None:
    path = Path(name.lower())
    if path.suffix in _PACKED:
        kind = _KINDS.get(path.with_suffix("").suffix)
        return None if kind == "parquet" else kind
    return _KINDS.get(path.suffix)
