"""Errors of nmoe-cli, and the exit codes of `n`."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar


class ExitCode(IntEnum):
    """What `n` returns to the shell; scripts may rely on it."""

    OK = 0
    """Done."""
    BUG = 1
    """An error that nmoe did not foresee; the traceback is for a report."""
    USAGE = 2
    """A mistake in the command line or the configuration."""
    DATA = 3
    """Missing, damaged or mismatched data, checkpoint or model folder."""
    DIVERGED = 4
    """The loss or a gradient was not finite; the weights are those before that step."""
    ENVIRONMENT = 5
    """The machine lacks what was asked for: GPU, driver, memory, disk; or it computes other bits the second time."""
    PEER = 6
    """Of one rank among several: another failed, or did not come; what that one said is the reason."""
    INTERRUPTED = 130
    """Stopped by SIGINT (Ctrl-C)."""
    TERMINATED = 143
    """Stopped by SIGTERM."""


class CliError(Exception):
    """Base of every error that nmoe-cli raises on purpose."""

    exit_code: ClassVar[ExitCode] = ExitCode.USAGE


class UsageError(CliError):
    """The command line asks for something that cannot be."""


class UnknownModelError(CliError):
    """No complete model on disk is what the command line names."""

    exit_code: ClassVar[ExitCode] = ExitCode.DATA


class EnvironmentNotReadyError(CliError):
    """The machine lacks something that the command needs."""

    exit_code: ClassVar[ExitCode] = ExitCode.ENVIRONMENT


@dataclass(frozen=True)
class Problem:
    """One mistake in a configuration."""

    where: str
    """`file:line`, or the `--set` that holds it."""
    key: str
    """Dotted key or section; empty where the mistake is in no key."""
    message: str
    """What was found, what is allowed, and the nearest valid name."""

    def __str__(self) -> str:
        return ": ".join(part for part in (self.where, self.key, self.message) if part)


class ConfigError(CliError):
    """Mistakes in a configuration: all that could be found at once, in the order of the files."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        count = "1 mistake" if len(self.problems) == 1 else f"{len(self.problems)} mistakes"
        super().__init__("\n  ".join([f"{count} in the configuration", *map(str, self.problems)]))
