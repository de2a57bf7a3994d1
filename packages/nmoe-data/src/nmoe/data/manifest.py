"""The manifest of a shard set: what is in the folder, to the byte."""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from nmoe.data.atomic import write_file
from nmoe.data.errors import ManifestError, MissingShardSetError
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

MANIFEST_NAME = "manifest.json"
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class FileRecord(_Record):
    """One file of a shard."""

    name: Annotated[str, Field(pattern=r"^shard_\d{5,}\.(npy|idx)$")]
    bytes: PositiveInt
    sha256: Sha256


class ShardRecord(_Record):
    """One shard: its tokens, and where its documents start."""

    tokens: FileRecord
    index: FileRecord
    n_tokens: PositiveInt
    n_documents: PositiveInt


class TokenizerRecord(_Record):
    """The tokenizer that made the tokens."""

    name: str
    fingerprint: Sha256
    n_vocab: PositiveInt
    eos_id: NonNegativeInt


class Manifest(_Record):
    """Everything about a shard set but the tokens themselves."""

    version: Literal[1] = 1
    tool: str
    """Package and version that wrote the set."""
    tokenizer: TokenizerRecord
    dtype: Literal["uint32"] = "uint32"
    n_tokens: PositiveInt
    """EOS of every document included."""
    n_documents: PositiveInt
    n_bytes: PositiveInt
    """UTF-8 bytes of the text: the divisor of bits per byte."""
    gzip_bits_per_byte: float | None = None
    """What gzip -9 needs for the text, where it was measured (validation sets)."""
    source: dict[str, Any]
    """Where the text came from, for people."""
    shards: Annotated[list[ShardRecord], Field(min_length=1)]

    @model_validator(mode="after")
    def _sums_agree(self) -> Self:
        if sum(shard.n_tokens for shard in self.shards) != self.n_tokens:
            raise ValueError("n_tokens is not the sum over the shards")
        if sum(shard.n_documents for shard in self.shards) != self.n_documents:
            raise ValueError("n_documents is not the sum over the shards")
        return self

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what decides the tokens: not of the tool, the source, the gzip figure, names or dates."""
        content = {
            "version": self.version,
            "tokenizer": self.tokenizer.fingerprint,
            "dtype": self.dtype,
            "shards": [shard.tokens.sha256 for shard in self.shards],
        }
        return _digest(content)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `folder/manifest.json`, with a checksum of its own; this completes the set."""
    content = manifest.model_dump(mode="json")
    content["checksum"] = _digest(content)
    write_file(folder / MANIFEST_NAME, (json.dumps(content, indent=1) + "\n").encode())


def read_manifest(folder: Path) -> Manifest:
    """Read and check `folder/manifest.json`. Raises MissingShardSetError or ManifestError."""
    path = folder / MANIFEST_NAME
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise _missing(folder) from error
    remedy = "Prepare the data again; the manifest was altered or written by another release."
    try:
        content = json.loads(data)
        if not isinstance(content, dict):
            raise TypeError(f"a JSON {type(content).__name__}")
        checksum = content.pop("checksum")
        if content.get("version") != 1:
            found = f"version {content.get('version')!r}"
            raise ManifestError(str(path), expected="a manifest of version 1", found=found, remedy=remedy)
        if _digest(content) != checksum:
            found = "content of another checksum"
            raise ManifestError(str(path), expected=f"checksum {checksum!r}", found=found, remedy=remedy)
        return Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        found = f"{'.'.join(str(part) for part in first['loc']) or 'content'}: {first['msg']}"
        raise ManifestError(str(path), expected="a shard set's manifest", found=found, remedy=remedy) from error
    except (ValueError, RecursionError, TypeError, KeyError) as error:
        found = f"{type(error).__name__}: {error}"
        raise ManifestError(str(path), expected="a shard set's manifest", found=found, remedy=remedy) from error


def _digest(content: dict[str, Any]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _missing(folder: Path) -> MissingShardSetError:
    if not folder.is_dir():
        found, remedy = "no such folder", "Check the path, or prepare the data (n data prep)."
    elif (folder / "train" / MANIFEST_NAME).exists():
        found, remedy = "a prepared folder that holds shard sets", f"Give {folder / 'train'} or its sibling val."
    elif prepared := sorted(path.parents[1].name for path in folder.glob(f"*/train/{MANIFEST_NAME}")):
        found, remedy = "a folder of prepared folders", f"Give one of them: {', '.join(prepared)}."
    else:
        found = "no manifest.json"
        remedy = "Give a folder that n data prep wrote, or prepare this one's again, if writing it was cut short."
    return MissingShardSetError(str(folder), expected="a shard set", found=found, remedy=remedy)
