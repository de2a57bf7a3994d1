"""Byte-pair vocabularies: the ranks, the pattern that splits text first, and the special tokens."""

import base64
import binascii
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from nmoe.data.errors import TokenizerFileError, TokenizerUnavailableError

EOS_TEXT = "<|endoftext|>"

# The patterns as published. tiktoken rewrites its own for speed from release to release; a fingerprint must not move
# with them, and the rewritten forms mean something else to the regex engine that reads an exported tokenizer.json.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
O200K_PATTERN = "|".join(
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
RELEASED_PATTERNS = {"gpt2": GPT2_PATTERN, "o200k_harmony": O200K_PATTERN}
# Where tiktoken fetches the ranks from: its cache names files by these.
_RELEASED_AT = {
    "gpt2": (
        "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe",
        "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/encoder.json",
    ),
    "o200k_harmony": ("https://openaipublic.blob.core.windows.net/encodings/o200k_base.tiktoken",),
}


@dataclass(frozen=True)
class Vocabulary:
    """What decides every token id.

    `ranks` maps each mergeable byte string to its id, which is also its merge priority; `specials` maps each special
    token to its id, `<|endoftext|>` among them; `pattern` splits text before merging, None where nothing merges.
    """

    ranks: dict[bytes, int]
    specials: dict[str, int]
    pattern: str | None

    @property
    def eos_id(self) -> int:
        """Id of the token that ends a document."""
        return self.specials[EOS_TEXT]

    @cached_property
    def n_vocab(self) -> int:
        """Ids in all, specials included: the largest id plus one."""
        return max(*self.ranks.values(), *self.specials.values()) + 1

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over ranks, specials and pattern; names do not enter."""
        digest = hashlib.sha256(b"nmoe vocabulary 1")
        for token, rank in sorted(self.ranks.items(), key=lambda item: item[1]):
            digest.update(rank.to_bytes(4, "little") + len(token).to_bytes(4, "little") + token)
        for text, number in sorted(self.specials.items()):
            data = text.encode()
            digest.update(number.to_bytes(4, "little") + len(data).to_bytes(4, "little") + data)
        digest.update((self.pattern or "").encode())
        return digest.hexdigest()

    def merges(self) -> list[tuple[bytes, bytes]]:
        """The pairs that merge, best first.

        A token can only ever come from one pair: the last two parts when its own bytes are merged alone, since merges
        inside a stretch of text do not depend on what stands around it. Tokens that merging never reaches have none.
        """
        pairs = ((token, _last_pair(token, self.ranks)) for token in sorted(self.ranks, key=self.ranks.__getitem__))
        return [pair for token, pair in pairs if pair is not None]


def _last_pair(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes] | None:
    """Merge the token's bytes, lowest rank first and leftmost among equals, and give the pair that made it whole."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 1:
        best, best_rank = -1, len(ranks)
        for i in range(len(parts) - 1):
            rank = ranks.get(parts[i] + parts[i + 1])
            if rank is not None and rank < best_rank:
                best, best_rank = i, rank
        if best < 0:
            return None
        if len(parts) == 2:
            return parts[0], parts[1]
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return None


def byte_vocabulary() -> Vocabulary:
    """Each byte is its own id; 256 ends a document."""
    return Vocabulary({bytes([value]): value for value in range(256)}, {EOS_TEXT: 256}, None)


def released_vocabulary(name: str) -> Vocabulary:
    """One of `RELEASED_PATTERNS` as OpenAI published it, from tiktoken's cache (`TIKTOKEN_CACHE_DIR`) or the network.

    Raises TokenizerUnavailableError if neither has it.
    """
    from tiktoken_ext.openai_public import ENCODING_CONSTRUCTORS  # type: ignore[import-untyped]

    try:
        parts: dict[str, Any] = ENCODING_CONSTRUCTORS[name]()
    except (OSError, ValueError) as error:
        raise TokenizerUnavailableError(
            f"tokenizer {name!r}",
            expected="its ranks in tiktoken's cache or on the network",
            found=str(error),
            remedy=f"Connect to the network once, or set TIKTOKEN_CACHE_DIR to a folder with {_cached_files(name)}.",
        ) from error
    return Vocabulary(parts["mergeable_ranks"], parts["special_tokens"], RELEASED_PATTERNS[name])


def _cached_files(name: str) -> str:
    """What tiktoken's cache must hold, for one who fetches it where there is a network."""
    addresses = _RELEASED_AT[name]
    return " and ".join(f"{address} as {hashlib.sha1(address.encode()).hexdigest()}" for address in addresses)


def file_vocabulary(path: Path) -> Vocabulary:
    """A local `.tiktoken` file: a line a token, its bytes in base64 and its rank; split by o200k's pattern.

    `<|endoftext|>` takes the id after the last rank. Raises TokenizerFileError unless the ranks are 0, 1, … without a
    gap and every single byte has one.
    """
    ranks: dict[bytes, int] = {}
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise _file_error(str(path), "a readable file", str(error)) from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where, form = f"{path}:{number}", "a token's bytes in base64, a space, its rank"
        try:
            encoded, rank = line.split()
            token, value = base64.b64decode(encoded, validate=True), int(rank)
        except (ValueError, binascii.Error) as error:
            raise _file_error(where, form, repr(line[:80])) from error
        if not token or token in ranks:
            raise _file_error(where, "a token that has not been listed yet", repr(token))
        ranks[token] = value
    missing = [value for value in range(256) if bytes([value]) not in ranks]
    if missing:
        raise _file_error(str(path), "a rank for each of the 256 bytes", f"none for byte {missing[0]:#04x}")
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise _file_error(str(path), f"the ranks 0 to {len(ranks) - 1}, each once", "gaps or doubles among the ranks")
    return Vocabulary(ranks, {EOS_TEXT: len(ranks)}, O200K_PATTERN)


def _file_error(what: str, expected: str, found: str) -> TokenizerFileError:
    return TokenizerFileError(what, expected=expected, found=found, remedy="Give a file that tiktoken wrote.")
