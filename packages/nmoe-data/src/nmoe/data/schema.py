"""The `[data]` section. Imports no tokenizer and no torch."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, model_validator


class DataConfig(BaseModel):
    """Where the tokens are. The tokens themselves enter the run's fingerprint by their manifest's hash."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokenizer: Annotated[str, "identity"]
    """`byte`, `gpt2`, `o200k_harmony`, or the path of a local `.tiktoken` file."""
    path: Path | None = None
    """What `n data prep --output` wrote: `train/` and, unless `val_path` is given, `val/`. Wins over `corpus`."""
    mixture: Path | None = None
    """A mixture's file: several sources in given proportions. Wins over `path` and `corpus`."""
    flow: str | None = None
    """The profile of token budgets, one for each of the mixture's stages; without one, its only stage has no end."""
    flow_profiles: Path = Path("configs/flow_profiles.toml")
    """The file of the profiles."""
    stage: str | None = None
    """The stage to train, which goes on where the stages before it left the sources; absent: all in their order."""
    document_masking: Annotated[bool, "identity"] = False
    """Attention sees nothing before the document that a token is in."""
    loss_mask_eos: Annotated[bool, "identity"] = False
    """The end of a document is no target of the loss."""
    val_path: Path | None = None
    """A validation shard set of its own (a folder with a manifest)."""
    corpus: Literal["pydoc"] | None = None
    """Without a `path`: text that ships with Python, prepared on first use under `${NMOE_DATA_PATH:-data}`."""

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        problems = []
        for name in ("flow", "stage"):
            if self.mixture is None and getattr(self, name) is not None:
                problems.append(f"{name} is of a mixture, and there is none: set mixture, or leave out {name}")
        if self.stage is not None and self.flow is None:
            problems.append("stage needs flow, which says how long the stages are")
        if problems:
            raise ValueError("; ".join(problems))
        return self
