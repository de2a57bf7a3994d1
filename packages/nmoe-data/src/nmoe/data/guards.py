"""Checks that tokens, tokenizer and model belong together, and that validation is no training text."""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
from nmoe.data.errors import OverlapError, TokenizerMismatchError, TokenRangeError
from nmoe.data.shards import ShardSet
from nmoe.data.tokenizers import Tokenizer

OVERLAP_LIMIT = 0.01
"""The part of a validation set's tokens, in whole documents, that training may hold too: what crawled text repeats by
itself is under it, after deduplication."""

_LOOKED_AT = 8
"""Tokens of a document that are compared with others' before all of it is."""


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


def check_apart(train: Sequence[ShardSet], val: ShardSet) -> None:
    """Raise OverlapError if validation is a training set's folder, or has a shard that a training set has too.

    Told by the manifests alone: no file is read.
    """
    remedy = "Set data.val_path to text that is not trained on, such as the val/ that n data prep keeps."
    of_val = {shard.tokens.sha256: shard.tokens.name for shard in val.manifest.shards}
    for shards in train:
        if shards.path.resolve() == val.path.resolve():
            raise OverlapError(
                str(val.path), expected="a validation set apart", found="the training set", remedy=remedy
            )
        for shard in shards.manifest.shards:
            name = of_val.get(shard.tokens.sha256)
            if name is not None:
                raise OverlapError(
                    str(val.path / name),
                    expected="text that is not trained on",
                    found=f"the same tokens as {shards.path / shard.tokens.name}",
                    remedy=remedy,
                )


def check_shared_documents(train: Sequence[ShardSet], val: ShardSet) -> None:
    """Raise OverlapError if documents that stand in training too, token for token, are `OVERLAP_LIMIT` of validation.

    A document's length and a few tokens find candidates, which are then compared whole. That touches every document
    of the training sets once: a second for a gigabyte that is in the page cache.
    """
    left: dict[int, list[npt.NDArray[np.uint32]]] = {}
    for tokens, bounds, keys in _documents(val):
        for key, (start, stop) in zip(keys.tolist(), bounds.tolist(), strict=True):
            left.setdefault(key, []).append(tokens[start:stop])
    known = np.array(list(left), np.uint64)
    shared, count, places = 0, 0, set()
    for shards in train:
        for tokens, bounds, keys in _documents(shards):
            for number in np.flatnonzero(np.isin(keys, known)).tolist():
                start, stop = bounds[number].tolist()
                candidates = left.get(int(keys[number]), [])
                same = [each for each in candidates if np.array_equal(each, tokens[start:stop])]
                if same:
                    left[int(keys[number])] = [each for each in candidates if not np.array_equal(each, same[0])]
                    shared, count = shared + sum(each.size for each in same), count + len(same)
                    places.add(str(shards.path))
    if shared and shared >= OVERLAP_LIMIT * val.n_tokens:
        raise OverlapError(
            str(val.path),
            expected=f"at most {OVERLAP_LIMIT:.0%} of its tokens in documents that are trained on",
            found=f"{shared / val.n_tokens:.1%}, {count} documents that stand in {' and '.join(sorted(places))} too",
            remedy="Set data.val_path to other text, or prepare the data again with --dedupe.",
        )


def _documents(
    shards: ShardSet,
) -> Iterator[tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64], npt.NDArray[np.uint64]]]:
    """Of each shard its tokens, its documents' first and last bounds (n, 2), and a key of each document."""
    for number in range(len(shards.manifest.shards)):
        tokens, index = shards.shard_tokens(number), shards.shard_index(number)
        stops = np.append(index[1:], tokens.size)
        lengths = stops - index
        keys = lengths.astype(np.uint64)
        for part in range(_LOOKED_AT):
            place = index + (lengths - 1) * part // (_LOOKED_AT - 1)
            keys = (keys ^ (keys >> np.uint64(29))) * np.uint64(0x9E3779B97F4A7C15) + tokens[place]
        yield tokens, np.stack((index, stops), axis=1), keys
