"""How many tokens a model on disk serves."""

from nmoe.cli.config import RunConfig
from nmoe.model.checkpoint import TensorFolder

_DOCUMENT = "context"


def context_document(length: int) -> dict[str, dict[str, int]]:
    """What an imported model's folder says of it, in tokens."""
    return {_DOCUMENT: {"length": length}}


def context_length(folder: TensorFolder, config: RunConfig | None) -> int | None:
    """In tokens: of a run what it was trained with, or what YaRN extends that to; else what the folder says, None where
    it says nothing."""
    if config is None:
        return int(folder.document(_DOCUMENT)["length"]) if _DOCUMENT in folder.document_names else None
    yarn = config.model.yarn
    return max(config.train.seq_len, 0 if yarn is None else int(yarn.original_seq_len * yarn.factor))
