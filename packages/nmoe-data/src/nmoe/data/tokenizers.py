"""Tokenizers: text to ids and back, and their Hugging Face form."""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from nmoe.data.errors import TokenRangeError, UnknownTokenizerError
from nmoe.data.vocabulary import (
    EOS_TEXT,
    RELEASED_PATTERNS,
    Vocabulary,
    byte_vocabulary,
    file_vocabulary,
    released_vocabulary,
)

# tiktoken's regex engine overflows its stack, and panics, on white space of some 300,000 characters: longer runs than
# this are cut. The sample of every 4,096th character shows any such run, so that other texts cost nothing.
_LONG_RUN = re.compile(r"\s{16384}")
_SAMPLED_RUN = re.compile(r"\s{4}")
_SAMPLE = 4096


class Tokenizer(ABC):
    """Turns text into token ids and back.

    Special tokens are never read from text: their spelling is encoded as ordinary text, so that no document can forge
    one. Characters that UTF-8 cannot express (lone surrogates) become U+FFFD.
    """

    def __init__(self, name: str, vocabulary: Vocabulary) -> None:
        self.name = name
        """`byte`, `gpt2`, `o200k_harmony`; for a file its stem and the start of its fingerprint."""
        self.vocabulary = vocabulary
        """The content that decides every id."""
        self.n_vocab = vocabulary.n_vocab
        """Ids in all, specials included."""
        self.eos_id = vocabulary.eos_id
        """The id that ends every document."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the vocabulary; the name does not enter."""
        return self.vocabulary.fingerprint

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without EOS."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[np.uint32]]:
        """Ids of each text as uint32 (tokens,), without EOS."""

    def decode_bytes(self, ids: Iterable[int] | npt.NDArray[np.integer]) -> bytes:
        """The bytes that the ids stand for; specials add nothing. Raises TokenRangeError for an unknown id."""
        values = ids.tolist() if isinstance(ids, np.ndarray) else list(ids)
        if values and not 0 <= min(values) <= max(values) < self.n_vocab:
            wrong = next(value for value in values if not 0 <= value < self.n_vocab)
            raise TokenRangeError(
                f"token id {wrong}",
                expected=f"0 to {self.n_vocab - 1}, the ids of tokenizer {self.name!r}",
                found=str(wrong),
                remedy="Decode with the tokenizer that made the ids.",
            )
        table = self._bytes
        return b"".join([table[value] for value in values])

    def decode(self, ids: Iterable[int] | npt.NDArray[np.integer], *, specials: bool = False) -> str:
        """The text that the ids stand for; bytes that are not UTF-8 become U+FFFD.

        `specials`: with the spelling of special tokens, for people; nothing tells it from the same text.
        """
        if not specials:
            return self.decode_bytes(ids).decode("utf-8", errors="replace")
        spelled = {number: text.encode() for text, number in self.vocabulary.specials.items()}
        values = [int(value) for value in ids]
        parts = [spelled.get(value) or self.decode_bytes([value]) for value in values]
        return b"".join(parts).decode("utf-8", errors="replace")

    @cached_property
    def _bytes(self) -> list[bytes]:
        table = [b""] * self.n_vocab
        for token, rank in self.vocabulary.ranks.items():
            table[rank] = token
        return table


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes are the ids 0 to 255; 256 ends a document."""

    def __init__(self) -> None:
        super().__init__("byte", byte_vocabulary())

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without EOS."""
        return list(to_utf8(text))

    def encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[np.uint32]]:
        """Ids of each text as uint32 (tokens,), without EOS."""
        return [np.frombuffer(to_utf8(text), dtype=np.uint8).astype(np.uint32) for text in texts]


class BpeTokenizer(Tokenizer):
    """Byte-pair encoding by tiktoken."""

    def __init__(self, name: str, vocabulary: Vocabulary) -> None:
        import tiktoken

        super().__init__(name, vocabulary)
        self._encoding = tiktoken.Encoding(
            name,
            pat_str=vocabulary.pattern or "",
            mergeable_ranks=dict(vocabulary.ranks),
            special_tokens=dict(vocabulary.specials),
        )

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without EOS."""
        ids: list[int] = []
        for piece in _pieces(text):
            ids += self._encoding.encode_ordinary(piece)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[np.uint32]]:
        """Ids of each text as uint32 (tokens,), without EOS."""
        return [self._encode_array(text) for text in texts]

    def __reduce__(self) -> tuple[Any, ...]:
        # tiktoken's own object cannot travel; its making from the vocabulary takes a fraction of a second.
        return BpeTokenizer, (self.name, self.vocabulary)

    def _encode_array(self, text: str) -> npt.NDArray[np.uint32]:
        arrays = [self._encoding.encode_to_numpy(piece, disallowed_special=()) for piece in _pieces(text)]
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def load_tokenizer(name_or_path: str) -> Tokenizer:
    """The tokenizer `byte`, `gpt2` or `o200k_harmony`, or that of a local `.tiktoken` file.

    Raises UnknownTokenizerError for any other name, TokenizerUnavailableError if a published tokenizer is neither
    cached nor within reach, and TokenizerFileError for a malformed file.
    """
    if name_or_path == "byte":
        return ByteTokenizer()
    if name_or_path in RELEASED_PATTERNS:
        return BpeTokenizer(name_or_path, released_vocabulary(name_or_path))
    path = Path(name_or_path)
    if path.suffix == ".tiktoken":
        vocabulary = file_vocabulary(path)
        return BpeTokenizer(f"{path.stem}-{vocabulary.fingerprint[:8]}", vocabulary)
    raise UnknownTokenizerError(
        f"tokenizer {name_or_path!r}",
        expected="'byte', 'gpt2', 'o200k_harmony', or the path of a .tiktoken file",
        found=repr(name_or_path),
        remedy="Choose one of these.",
    )


def to_utf8(text: str) -> bytes:
    """UTF-8 of `text`; lone surrogates, which JSON can carry and UTF-8 cannot, become U+FFFD."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return _scrub(text).encode()


def _scrub(text: str) -> str:
    # Through UTF-16, so that two surrogates that make a pair become their character.
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _pieces(text: str) -> list[str]:
    """The text in pieces that tiktoken can take; all but freak texts are one piece."""
    try:
        text.encode()
    except UnicodeEncodeError:
        text = _scrub(text)
    if _SAMPLED_RUN.search(text[::_SAMPLE]) is None:
        return [text]
    borders = [0, *(run.end() for run in _LONG_RUN.finditer(text)), len(text)]
    return [text[start:stop] for start, stop in pairwise(borders)]


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """Content of the `tokenizer.json` with which Hugging Face's `tokenizers` gives the same ids.

    Two differences remain: it reads special tokens from text, and it does not cut white space of 16,384 characters.
    """
    vocabulary, symbol = tokenizer.vocabulary, _byte_symbols()

    def spell(token: bytes) -> str:
        return "".join([symbol[value] for value in token])

    # An id may have two spellings (200018 of o200k_harmony); the format takes one, and the later one is the reserve.
    specials = {number: text for text, number in reversed(vocabulary.specials.items())}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": vocabulary.pattern}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": number,
                "content": text,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for number, text in sorted(specials.items())
        ],
        "normalizer": None,
        "pre_tokenizer": (
            byte_level if vocabulary.pattern is None else {"type": "Sequence", "pretokenizers": [split, byte_level]}
        ),
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            # tiktoken looks a whole piece up before it merges; so must the export.
            "ignore_merges": True,
            "vocab": {spell(token): rank for token, rank in sorted(vocabulary.ranks.items(), key=lambda item: item[1])},
            "merges": [[spell(left), spell(right)] for left, right in vocabulary.merges()],
        },
    }


def tokenizer_config(tokenizer: Tokenizer, model_max_length: int | None = None) -> dict[str, Any]:
    """Content of the `tokenizer_config.json` that goes with `tokenizer_json`; the length is in tokens."""
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS_TEXT,
        "clean_up_tokenization_spaces": False,
    }
    if model_max_length is not None:
        config["model_max_length"] = model_max_length
    return config


def _byte_symbols() -> list[str]:
    """The printable character that stands for each byte in byte-level BPE: itself, or else one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [value for value in range(256) if value not in printable]
    return [chr(value) if value in printable else chr(0x100 + others.index(value)) for value in range(256)]
