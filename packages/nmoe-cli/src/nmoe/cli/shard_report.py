"""Shard sets in rows for tables."""

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from nmoe.cli.units import format_bytes, format_count
from nmoe.data.shards import ShardSet

Rows = list[tuple[str, str]]
VERIFY_HEADER = ("set", "documents", "tokens", "shards", "on disk", "checked")


def set_rows(shards: ShardSet) -> Rows:
    """What a set holds, in one row, and what gzip makes of it where that was measured."""
    sizes = (
        f"{shards.n_documents} documents, {format_bytes(shards.n_bytes)} of text, "
        f"{format_count(shards.n_tokens)} tokens ({shards.n_bytes / shards.n_tokens:.2f} bytes each)"
    )
    rows = [(shards.path.name, sizes)]
    gzip = shards.manifest.gzip_bits_per_byte
    if gzip is not None:
        rows.append((f"gzip on {shards.path.name}", f"{gzip:.3f} bits per byte, for a model to beat"))
    return rows


def verify_row(shards: ShardSet, checked: str) -> tuple[str, ...]:
    """What a set that was found whole holds, under `VERIFY_HEADER`."""
    manifest = shards.manifest
    size = sum(shard.tokens.bytes + shard.index.bytes for shard in manifest.shards)
    return (
        str(shards.path),
        f"{shards.n_documents:,}",
        f"{shards.n_tokens:,}",
        f"{len(manifest.shards):,}",
        format_bytes(size),
        f"ok, {checked}",
    )


def detail_rows(shards: ShardSet) -> Rows:
    """All that a set's manifest says, in rows."""
    manifest, made_by = shards.manifest, shards.manifest.tokenizer
    source = dict(manifest.source)
    prep = source.pop("prep", {})
    rows = [
        ("documents", f"{shards.n_documents:,}"),
        ("tokens", f"{shards.n_tokens:,}, the end of each document included; {manifest.dtype}"),
        ("text", f"{shards.n_bytes:,} bytes, {shards.n_bytes / shards.n_tokens:.2f} a token"),
        ("tokenizer", f"{made_by.name}, {made_by.n_vocab:,} ids, end-of-text {made_by.eos_id}"),
        ("", f"fingerprint {made_by.fingerprint}"),
        ("shards", str(len(manifest.shards))),
        ("source", _spell(source)),
        ("written by", manifest.tool + (f", {_spell(prep)}" if prep else "")),
        ("fingerprint", shards.fingerprint),
    ]
    if manifest.gzip_bits_per_byte is not None:
        rows.insert(3, ("gzip", f"{manifest.gzip_bits_per_byte:.3f} bits per byte"))
    return rows


def document_rows(shards: ShardSet, tokens: npt.NDArray[np.uint32]) -> Rows:
    """Sizes of one document, (tokens,) with its EOS."""
    return [
        ("of", f"{shards.n_documents:,} documents"),
        ("tokens", f"{tokens.size:,}, the end of the document included"),
    ]


def sample_rows(
    shards: ShardSet, start: int, tokens: npt.NDArray[np.uint32]
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The documents that a sample, (S + 1,) tokens from `start` on, takes parts of: header and rows."""
    ends = np.flatnonzero(tokens == shards.eos_id) + 1
    borders = sorted({0, *ends.tolist(), tokens.size})
    rows: list[tuple[str, ...]] = [
        (
            str(number),
            f"{start + first:,} to {start + stop - 1:,}",
            str(stop - first),
            "ends" if stop in ends else "goes on",
        )
        for number, (first, stop) in enumerate(pairwise(borders))
    ]
    return ("part", "positions", "tokens", "document"), rows


def _spell(values: dict[str, Any]) -> str:
    spelled = (
        f"{key} {' '.join(map(str, value)) if isinstance(value, list) else value}"
        for key, value in values.items()
        if value is not None
    )
    return ", ".join(spelled)
