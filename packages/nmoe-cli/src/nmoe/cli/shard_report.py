"""Shard sets in rows of label and value."""

from nmoe.cli.units import format_bytes, format_count
from nmoe.data.shards import ShardSet

Rows = list[tuple[str, str]]


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


def detail_rows(shards: ShardSet) -> Rows:
    """All that a set's manifest says, in rows."""
    manifest, made_by = shards.manifest, shards.manifest.tokenizer
    source = ", ".join(
        f"{key} {' '.join(map(str, value)) if isinstance(value, list) else value}"
        for key, value in manifest.source.items()
    )
    rows = [
        ("documents", f"{shards.n_documents:,}"),
        ("tokens", f"{shards.n_tokens:,}, the end of each document included"),
        ("text", f"{shards.n_bytes:,} bytes, {shards.n_bytes / shards.n_tokens:.2f} a token"),
        ("tokenizer", f"{made_by.name}, {made_by.n_vocab:,} ids, end-of-text {made_by.eos_id}"),
        ("shards", str(len(manifest.shards))),
        ("source", source),
        ("written by", manifest.tool),
        ("fingerprint", shards.fingerprint),
    ]
    if manifest.gzip_bits_per_byte is not None:
        rows.insert(3, ("gzip", f"{manifest.gzip_bits_per_byte:.3f} bits per byte"))
    return rows
