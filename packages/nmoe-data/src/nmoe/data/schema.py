"""The `[data]` section. Imports no tokenizer and no torch."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict


class DataConfig(BaseModel):
    """Where the tokens are. The tokens themselves enter the run's fingerprint by their manifest's hash."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokenizer: Annotated[str, "identity"]
    """`byte`, `gpt2`, `o200k_harmony`, or the path of a local `.tiktoken` file."""
    path: Path | None = None
    """What `n data prep --output` wrote: `train/` and, unless `val_path` is given, `val/`. Wins over `corpus`."""
    val_path: Path | None = None
    """A validation shard set of its own (a folder with a manifest)."""
    corpus: Literal["pydoc"] | None = None
    """Without a `path`: text that ships with Python, prepared on first use under `${NMOE_DATA_PATH:-data}`."""
