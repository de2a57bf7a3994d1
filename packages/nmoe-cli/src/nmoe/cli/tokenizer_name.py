"""Which tokenizer belongs to a model on disk."""

import json
from pathlib import Path
from typing import Any

from nmoe.cli.errors import UsageError
from nmoe.data.tokenizers import Tokenizer, load_tokenizer, tokenizer_config, tokenizer_json
from nmoe.model.checkpoint import TensorFolder

_DOCUMENT = "tokenizer"
_EXPORTED_FILE, _EXPORTED_KEY = "tokenizer_config.json", "nmoe_tokenizer"


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
    _check_same(folder.document(_DOCUMENT), folder.path, tokenizer)


def exported_files(name: str, tokenizer: Tokenizer, max_length: int) -> dict[str, Any]:
    """What a Hugging Face folder has of a tokenizer, by file name; `imported_document` finds there which it was.

    Args:
        name: to load it by; of a file that is where it is here, its last part is told.
        tokenizer: of that name.
        max_length: tokens that the model serves.
    """
    document = tokenizer_document(Path(name).name, tokenizer)[_DOCUMENT]
    config = tokenizer_config(tokenizer, max_length) | {_EXPORTED_KEY: document}
    return {"tokenizer.json": tokenizer_json(tokenizer), _EXPORTED_FILE: config}


def imported_document(folder: Path, given: str | None) -> dict[str, dict[str, str]]:
    """What the folder of an imported model says of its tokenizer: of the one given, else of the one that `n export` has
    written down; nothing if neither is.

    Raises:
        UsageError: the one given is not the one that `n export` has written down, or that one is a file and none is
            given.
    """
    exported = _exported(folder)
    if given is None:
        if exported is not None and Path(exported["name"]).suffix == ".tiktoken":
            raise UsageError(
                f"{folder} was exported with the tokenizer of the file {exported['name']}, fingerprint "
                f"{exported['fingerprint'][:12]}: add --tokenizer with that file's path"
            )
        return {} if exported is None else {_DOCUMENT: exported}
    tokenizer = load_tokenizer(given)
    if exported is not None:
        _check_same(exported, folder, tokenizer)
    return tokenizer_document(given, tokenizer)


def _exported(folder: Path) -> dict[str, str] | None:
    """What `n export` has written down; None in a folder that others made, whose files are as they please."""
    try:
        found = json.loads((folder / _EXPORTED_FILE).read_bytes())[_EXPORTED_KEY]
        document = {key: found[key] for key in ("name", "fingerprint")}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return document if all(isinstance(value, str) for value in document.values()) else None


def _check_same(document: dict[str, str], folder: Path, tokenizer: Tokenizer) -> None:
    if document["fingerprint"] != tokenizer.fingerprint:
        raise UsageError(
            f"expected the tokenizer that {folder} was trained with ({document['name']}, fingerprint "
            f"{document['fingerprint'][:12]}), found {tokenizer.name}, fingerprint {tokenizer.fingerprint[:12]}: "
            "its ids mean other text"
        )
