"""Splits of Hugging Face datasets: from a local copy, or else from the hub."""

import csv
import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nmoe.eval.errors import MissingDataError, TaskDataError
from nmoe.eval.items import Item, read_jsonl
from nmoe.eval.sources import Sources

SUFFIXES = ("jsonl", "json", "parquet", "csv")


@dataclass(frozen=True)
class Split:
    """One split's rows in order, and a digest of their bytes, or of their content where the hub gave them."""

    items: tuple[Item, ...]
    sha256: str


def load_split(sources: Sources, dataset: str, config: str | None, split: str) -> Split:
    """Rows of one split.

    A local copy of `owner/name` is a folder `owner/name` or `name` in one of the sources' folders. In it, or in its
    folder `config`, the split is `split.jsonl`, `.json`, `.parquet` or `.csv`, or as the hub has it, one or more files
    `split-….parquet`, or such files in `data`.

    Raises:
        MissingDataError: the split is neither in a folder nor to be had from the hub, with where it was looked for.
        TaskDataError: a file cannot be read.
    """
    places = _places(sources.folders, dataset, config)
    for place in places:
        if files := _files(place, split):
            return _read(files)
    looked = ", ".join(map(str, places)) or "no folder"
    if not sources.hub:
        raise MissingDataError(f"expected split {split!r} of {_named(dataset, config)} in one of: {looked}; found none")
    return _from_hub(dataset, config, split, looked)


def _named(dataset: str, config: str | None) -> str:
    return dataset if config is None else f"{dataset} ({config})"


def _places(folders: Sequence[Path], dataset: str, config: str | None) -> list[Path]:
    roots = [folder / name for folder in folders for name in (dataset, dataset.rpartition("/")[2])]
    return [root / config for root in roots if config is not None] + roots if config is not None else roots


def _files(place: Path, split: str) -> list[Path]:
    if not place.is_dir():
        return []
    for folder in (place, place / "data"):
        for suffix in SUFFIXES:
            if (folder / f"{split}.{suffix}").is_file():
                return [folder / f"{split}.{suffix}"]
        if parts := sorted(folder.glob(f"{split}-*.parquet")):
            return parts
    return []


def _read(files: Sequence[Path]) -> Split:
    if files[0].suffix == ".jsonl":
        items, digest = read_jsonl(files[0])
        return Split(tuple(items), digest)
    found: list[Item] = []
    whole = hashlib.sha256()
    for path in files:
        data = path.read_bytes()
        whole.update(data)
        try:
            rows = _rows(path, data)
        except (ValueError, OSError) as error:  # pyarrow's, json's and csv's are among these
            raise TaskDataError(path, None, f"expected {path.suffix[1:]} of rows, found: {error}") from error
        found += [Item(path, number, row) for number, row in enumerate(rows, start=1)]
    if not found:
        raise TaskDataError(files[0], None, "expected rows, found none")
    return Split(tuple(found), whole.hexdigest())


def _rows(path: Path, data: bytes) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        from pyarrow import parquet

        rows: list[dict[str, Any]] = parquet.read_table(io.BytesIO(data)).to_pylist()
        return rows
    if path.suffix == ".csv":
        return list(csv.DictReader(io.StringIO(data.decode("utf-8"), newline="")))
    value = json.loads(data)
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        raise ValueError("something else than a list of objects")
    return value


def _from_hub(dataset: str, config: str | None, split: str, looked: str) -> Split:
    import datasets

    try:
        rows = datasets.load_dataset(dataset, config, split=split)
    except Exception as error:  # of many kinds: the network's, the hub's, the library's own
        raise MissingDataError(
            f"expected split {split!r} of {_named(dataset, config)} in one of: {looked}, or on the Hugging Face hub; "
            f"found none: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        ) from error
    items = [Item(f"{_named(dataset, config)}, {split}", number, row) for number, row in enumerate(rows, start=1)]
    content = json.dumps([item.fields for item in items], sort_keys=True, default=str).encode()
    return Split(tuple(items), hashlib.sha256(content).hexdigest())
