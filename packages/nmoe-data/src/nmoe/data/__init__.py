"""Text to token shards, and shards to deterministic batches."""

from importlib import import_module
from typing import Any

_EXPORTS = {
    "IGNORE_INDEX": "loader",
    "DataConfig": "schema",
    "DataError": "errors",
    "Loader": "loader",
    "Manifest": "manifest",
    "Prepared": "prep",
    "ShardSet": "shards",
    "TextFiles": "sources",
    "Tokenizer": "tokenizers",
    "check_tokenizer": "guards",
    "check_vocabulary": "guards",
    "corpus_description": "corpus",
    "gzip_bits_per_byte": "prep",
    "load_tokenizer": "tokenizers",
    "prepare": "prep",
    "prepare_corpus": "corpus",
    "rank_slice": "loader",
    "tokenizer_config": "tokenizers",
    "tokenizer_json": "tokenizers",
    "validation_batches": "loader",
}
__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
