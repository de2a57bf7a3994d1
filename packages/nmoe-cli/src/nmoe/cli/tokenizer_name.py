"""Which tokenizer belongs to a model on disk."""

from nmoe.cli.errors import UsageError
from nmoe.model.checkpoint import TensorFolder


def tokenizer_name(folder: TensorFolder, given: str | None) -> str:
    """The tokenizer given, else the one that the folder names.

    Raises:
        UsageError: neither names one.
    """
    if given is not None:
        return given
    if "tokenizer" in folder.document_names:
        return str(folder.document("tokenizer")["name"])
    raise UsageError(f"{folder.path} names no tokenizer: add --tokenizer")
