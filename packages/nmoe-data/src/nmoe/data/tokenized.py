"""A block's documents as tokens: what tokenizing gives, in this process or a worker."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from nmoe.data.errors import TokenRangeError
from nmoe.data.tokenizers import Tokenizer, to_utf8

DIGEST_BYTES = 16


@dataclass(frozen=True)
class Tokenized:
    """Documents, one after the other."""

    tokens: npt.NDArray[np.uint32]
    """All tokens (tokens,); each document ends with EOS."""
    lengths: npt.NDArray[np.int64]
    """Tokens of each document (documents,), EOS included."""
    n_bytes: npt.NDArray[np.int64]
    """UTF-8 bytes of each document (documents,)."""
    digests: bytes = b""
    """16 bytes of BLAKE2b over each document's UTF-8 text, where asked for."""

    def take(self, keep: npt.NDArray[np.bool_]) -> "Tokenized":
        """The documents that `keep` (documents,) says, without digests."""
        if keep.all():
            return self
        return Tokenized(self.tokens[np.repeat(keep, self.lengths)], self.lengths[keep], self.n_bytes[keep])

    def head(self, count: int) -> "Tokenized":
        """The first `count` documents, without digests."""
        lengths = self.lengths[:count]
        return Tokenized(self.tokens[: int(lengths.sum())], lengths, self.n_bytes[:count])


def tokenize(texts: Sequence[str], tokenizer: Tokenizer, *, digests: bool = False) -> Tokenized:
    """Tokenize documents. Raises TokenRangeError if the tokenizer gives an id that it says it does not have."""
    utf8 = [to_utf8(text) for text in texts]
    eos = np.array([tokenizer.eos_id], np.uint32)
    parts = [part for ids in tokenizer.encode_batch(texts) for part in (ids, eos)]
    tokens = np.concatenate(parts) if parts else np.empty(0, np.uint32)
    if tokens.size and tokens.max() >= tokenizer.n_vocab:
        raise TokenRangeError(
            f"tokenizer {tokenizer.name!r}",
            expected=f"ids under {tokenizer.n_vocab}",
            found=str(tokens.max()),
            remedy="Mend the tokenizer.",
        )
    return Tokenized(
        tokens,
        np.fromiter((ids.size + 1 for ids in parts[::2]), np.int64, len(texts)),
        np.fromiter(map(len, utf8), np.int64, len(texts)),
        b"".join(hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest() for data in utf8) if digests else b"",
    )
