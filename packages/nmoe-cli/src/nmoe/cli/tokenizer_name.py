"""Which tokenizer belongs to a model on disk."""

from nmoe.cli.errors import UsageError
from nmoe.data.tokenizers import Tokenizer, load_tokenizer
from nmoe.model.checkpoint import TensorFolder

_DOCUMENT = "tokenizer"


def tokenizer_document(name: str, tokenizer: Tokenizer) -> dict[str, dict[str, str]]:
    """What a model's folder says of its tokenizer: the name to load it by, and its content's fingerprint."""
    return {_DOCUMENT: {"name": name, "fingerprint": tokenizer.fingerprint}}


def tokenizer_name(folder: TensorFolder, given: str | None) -> str:
    """The tokenizer's name as given, else as the folder has it.

    Raises:
        UsageError: neither names one.
    """
    if given is not None:
        return given
    if _DOCUMENT not in folder.document_names:
        raise UsageError(
            f"{folder.path} names no tokenizer: add --tokenizer byte, gpt2, o200k_harmony or a .tiktoken file; "
            "given to `n import`, it is kept with the model"
        )
    return str(folder.document(_DOCUMENT)["name"])


def model_tokenizer(folder: TensorFolder, given: str | None) -> Tokenizer:
    """The tokenizer given, else the one that the folder names; it must be the one that the model was trained with.

    Raises:
        UsageError: there is no name, or the tokenizer of that name is another one.
    """
    tokenizer = load_tokenizer(tokenizer_name(folder, given))
    check_same_tokenizer(folder, tokenizer)
    return tokenizer


def check_same_tokenizer(folder: TensorFolder, tokenizer: Tokenizer) -> None:
    """Refuses a tokenizer whose content is not that of the one that the folder names, if it names one.

    Raises:
        UsageError: it is another one.
    """
    if _DOCUMENT not in folder.document_names:
        return
    document = folder.document(_DOCUMENT)
    if document["fingerprint"] != tokenizer.fingerprint:
        raise UsageError(
            f"expected the tokenizer that {folder.path} was trained with ({document['name']}, fingerprint "
            f"{document['fingerprint'][:12]}), found {tokenizer.name}, fingerprint {tokenizer.fingerprint[:12]}: "
            "its ids mean other text"
        )
