"""Checks that tokens, tokenizer and model belong together."""

from nmoe.data.errors import TokenizerMismatchError, TokenRangeError
from nmoe.data.shards import ShardSet
from nmoe.data.tokenizers import Tokenizer


def check_tokenizer(shards: ShardSet, tokenizer: Tokenizer) -> None:
    """Raise TokenizerMismatchError unless `tokenizer` made the tokens.

    Compared is the content (ranks, pattern, specials), not the name.
    """
    made_by = shards.manifest.tokenizer
    if made_by.fingerprint != tokenizer.fingerprint:
        raise TokenizerMismatchError(
            str(shards.path),
            expected=f"tokens of tokenizer {tokenizer.name!r} (fingerprint {tokenizer.fingerprint[:12]})",
            found=f"tokens of {made_by.name!r} (fingerprint {made_by.fingerprint[:12]})",
            remedy="Set data.tokenizer to the one that made the tokens, or prepare the data again.",
        )


def check_vocabulary(shards: ShardSet, vocab_size: int) -> None:
    """Raise TokenRangeError if the set may hold ids that a model of `vocab_size` ids does not know."""
    made_by = shards.manifest.tokenizer
    if made_by.n_vocab > vocab_size:
        raise TokenRangeError(
            str(shards.path),
            expected=f"token ids under the model's {vocab_size}",
            found=f"ids up to {made_by.n_vocab - 1}, of tokenizer {made_by.name!r}",
            remedy=f"Set the model's vocabulary to {made_by.n_vocab} or more.",
        )
