"""Text to token shards, and shards to deterministic batches."""

from importlib import import_module
from typing import Any

_EXPORTS = {
    "DataConfig": "schema",
    "DataError": "errors",
    "Documents": "documents",
    "IGNORE_INDEX": "documents",
    "Loader": "loader",
    "Manifest": "manifest",
    "Mixture": "mixture",
    "Plan": "plan",
    "Prepared": "prep",
    "Progress": "prep",
    "ShardSet": "shards",
    "Source": "sources",
    "Tokenizer": "tokenizers",
    "check_apart": "guards",
    "check_shared_documents": "guards",
    "check_tokenizer": "guards",
    "check_vocabulary": "guards",
    "corpus_description": "corpus",
    "gzip_bits_per_byte": "prep",
    "load_tokenizer": "tokenizers",
    "make_plan": "plan",
    "open_source": "sources",
    "permute": "permutation",
    "prepare": "prep",
    "prepare_corpus": "corpus",
    "prepare_documents": "prep",
    "rank_slice": "loader",
    "read_budgets": "mixture",
    "read_mixture": "mixture",
    "tokenizer_config": "tokenizers",
    "tokenizer_json": "tokenizers",
    "validation_batches": "loader",
}
__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
