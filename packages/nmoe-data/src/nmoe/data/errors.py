"""Errors of nmoe-data. Every one says what was expected, what was found, and what to do."""


class DataError(Exception):
    """Base of every error that nmoe-data raises on purpose.

    `what` names the file, folder or argument at fault; `expected`, `found` and `remedy` are kept as attributes.
    """

    def __init__(self, what: str, *, expected: str, found: str, remedy: str) -> None:
        super().__init__(f"{what}: expected {expected}, found {found}. {remedy}")
        self.what = what
        self.expected = expected
        self.found = found
        self.remedy = remedy


class ArgumentError(DataError, ValueError):
    """An argument lies outside what the call takes."""


class TokenizerError(DataError):
    """Base of the errors about tokenizers."""


class UnknownTokenizerError(TokenizerError):
    """The name is neither a known tokenizer nor a local `.tiktoken` file."""


class TokenizerUnavailableError(TokenizerError):
    """The tokenizer's ranks are neither cached on this machine nor within reach."""


class TokenizerFileError(TokenizerError):
    """A `.tiktoken` file is malformed; the message names the file and the line."""


class TokenizerMismatchError(TokenizerError):
    """Tokens were made with another tokenizer than the one at hand."""


class TokenRangeError(TokenizerError):
    """A token id lies outside the vocabulary."""


class SourceError(DataError):
    """A source file is missing, unreadable or malformed; the message names the file and, where known, the line."""


class EmptySourceError(SourceError):
    """The sources hold no document, or too few to split."""


class SourceChangedError(SourceError):
    """The sources gave other documents on the second reading than on the first."""


class CorpusUnavailableError(SourceError):
    """The text of a built-in corpus is not installed."""


class OutputExistsError(DataError):
    """The output folder exists already; nothing is ever overwritten."""


class WriteError(DataError):
    """The disk refused a write: full, read-only or failing."""


class ShardSetError(DataError):
    """Base of the errors about shard sets on disk."""


class MissingShardSetError(ShardSetError):
    """There is no such folder, or it has no manifest: not a shard set, or one whose writing was cut short."""


class ManifestError(ShardSetError):
    """A manifest is unreadable, altered, or of a version that this release does not know."""


class CorruptShardError(ShardSetError):
    """A shard is missing, truncated, altered or of a foreign type; the message names the file."""


class TokenPositionError(ShardSetError, IndexError):
    """A position lies outside the shard set."""


class TooFewTokensError(ShardSetError):
    """The shard set is too short for one sample."""
