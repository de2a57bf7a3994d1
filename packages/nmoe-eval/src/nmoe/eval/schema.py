"""The `[eval]` section. Imports no torch."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, PositiveInt


class EvalConfig(BaseModel):
    """What is measured while a run trains."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    every: PositiveInt | None = None
    """Steps between evaluations; absent: only after the last step."""
    tasks: tuple[Literal["validation"], ...] = ("validation",)
    """`validation`: loss and bits per byte, every validation byte scored once. Empty: nothing is measured."""
    max_sequences: PositiveInt | None = None
    """Only the first so many sequences of the validation set, where it is large; absent: all of it."""
