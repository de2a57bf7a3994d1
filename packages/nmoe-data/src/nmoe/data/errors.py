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

    def __reduce__(self) -> tuple[object, ...]:
        # Pickling: a worker process hands its error on.
        return _rebuild, (type(self), self.what, self.expected, self.found, self.remedy)


def _rebuild(kind: type[DataError], what: str, expected: str, found: str, remedy: str) -> DataError:
    return kind(what, expected=expected, found=found, remedy=remedy)


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
    """A source is another one than when it was opened."""


class CorpusUnavailableError(SourceError):
    """The text of a built-in corpus is not installed."""


class NetworkError(SourceError):
    """A server did not answer, or not with what it promised, however often it was asked."""


class PrepStateError(DataError):
    """What an interrupted prep left cannot be continued: begun with other settings, or damaged."""


class PrepRunningError(DataError):
    """Another process prepares the same output at this moment."""


class WorkerDiedError(DataError):
    """A worker process of prep ended without an answer: out of memory, or killed."""


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


class MixtureError(DataError):
    """A mixture's or a flow's file makes no sense; the message names the file and each key at fault."""


class PlanError(DataError):
    """Mixture, flow and run do not go together; the message says where they part."""


class OverlapError(DataError):
    """Validation text is training text too."""
