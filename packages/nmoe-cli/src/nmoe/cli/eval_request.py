"""What `n eval` was asked for."""

from dataclasses import dataclass
from pathlib import Path

from nmoe.cli.open_model import Device
from nmoe.eval.schema import VALIDATION
from nmoe.kernels.ops import Tier

BITS_PER_BYTE = "bpb"


@dataclass(frozen=True)
class EvalRequest:
    """The command line's words; what each means stands in `nmoe.cli.commands.evaluate`."""

    run: str
    names: tuple[str, ...]
    limit: int | None
    data: Path | None
    out: Path | None
    allow_missing: bool
    unsafe_exec: bool
    max_tokens: int | None
    tokenizer: str | None
    seq_len: int | None
    batch_size: int
    device: Device | None
    kernels: Tier | None
    gpus: int | None

    @property
    def validates(self) -> bool:
        """Whether the validation set is measured."""
        return VALIDATION in self.names

    @property
    def measures_text(self) -> bool:
        """Whether bits per byte are measured."""
        return BITS_PER_BYTE in self.names

    @property
    def benchmarks(self) -> list[str]:
        """All other tasks."""
        return [name for name in self.names if name not in (VALIDATION, BITS_PER_BYTE)]

    def arguments(self) -> list[str]:
        """Of `n`, to ask for the same."""
        valued = {
            "--tasks": ",".join(self.names), "--limit": self.limit, "--data": self.data, "--out": self.out,
            "--max-tokens": self.max_tokens, "--tokenizer": self.tokenizer, "--seq-len": self.seq_len,
            "--batch-size": self.batch_size, "--device": self.device, "--kernels": self.kernels, "--gpus": self.gpus,
        }  # fmt: skip
        flags = {"--allow-missing": self.allow_missing, "--unsafe-exec": self.unsafe_exec}
        given = [part for name, value in valued.items() if value is not None for part in (name, str(value))]
        return ["eval", self.run, *given, *(name for name, is_set in flags.items() if is_set)]
