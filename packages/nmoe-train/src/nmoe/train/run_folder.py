"""A run's folder: where everything about one run is.

<root>/runs/<run_id>/config.toml     resolved configuration
<root>/runs/<run_id>/env.json        what produced the run, see `nmoe.train.environment`
<root>/runs/<run_id>/metrics/        see `nmoe.train.metrics`
<root>/runs/<run_id>/checkpoints/    see `nmoe.train.checkpointer`
<root>/runs/<run_id>/lock            locked while a process writes the run; its text names the holder
"""

import fcntl
import json
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nmoe.train.environment import environment
from nmoe.train.errors import InvalidRunIdError, RunExistsError, RunLockedError, UnknownRunError
from nmoe.train.files import write_atomically

__all__ = ["RunFolder", "environment", "new_run_id"]

_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def new_run_id() -> str:
    """A name for a new run: the time (UTC), so that names sort by age, and random letters, so that they differ."""
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"


class RunFolder:
    """Paths of one run. Making the object touches no disk."""

    def __init__(self, root: Path, run_id: str) -> None:
        """Names a run.

        Args:
            root: The data root; runs are under `root / "runs"`.
            run_id: The run's name.

        Raises:
            InvalidRunIdError: the name cannot be a folder's.
        """
        if not _RUN_ID.fullmatch(run_id):
            raise InvalidRunIdError(run_id)
        self.run_id = run_id
        self.path = root / "runs" / run_id
        self.config = self.path / "config.toml"
        self.env = self.path / "env.json"
        self.metrics = self.path / "metrics"
        self.checkpoints = self.path / "checkpoints"

    def create(self, config_toml: str, env: Mapping[str, Any]) -> None:
        """Makes the folder of a new run, with its configuration and environment, all or nothing.

        Raises:
            RunExistsError: there is a run of this name.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.run_id}.tmp-{os.getpid()}")
        temporary.mkdir(exist_ok=True)
        try:
            write_atomically(temporary / self.config.name, config_toml.encode())
            write_atomically(temporary / self.env.name, _to_json(env))
            # The rename takes the name: of two processes that create one run, one fails.
            temporary.rename(self.path)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if os.path.lexists(self.path):
                raise RunExistsError(self.path) from error
            raise

    def open(self) -> None:
        """Checks that the run exists.

        Raises:
            UnknownRunError: it does not; names the nearest run.
        """
        if not self.config.is_file():
            known = sorted(path.parent.name for path in self.path.parent.glob(f"[!.]*/{self.config.name}"))
            raise UnknownRunError(self.run_id, self.path.parent, known)

    def rewrite(self, config_toml: str, env: Mapping[str, Any]) -> None:
        """Records what continues the run: `config.toml` and `env.json` become the given ones.

        What they were stays beside them under a number, `config.0.toml` first, so that a run tells all that made it.
        """
        for path, content in ((self.config, config_toml.encode()), (self.env, _to_json(env))):
            before = path.read_bytes()
            if before != content:
                number = len(list(self.path.glob(f"{path.stem}.*{path.suffix}")))
                write_atomically(path.with_name(f"{path.stem}.{number}{path.suffix}"), before)
                write_atomically(path, content)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the run for writing while the block runs. The system frees it when the process ends, however it ends.

        Raises:
            RunLockedError: another process, or another lock in this one, holds it; says who.
        """
        with open(self.path / "lock", "a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise RunLockedError(self.path, file.read() or "a process without a name") from None
            now = datetime.now(UTC)
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}, since {now:%Y-%m-%d %H:%M:%S} UTC")
            file.flush()
            try:
                yield
            finally:
                # Not left to closing: a forked child may still have the file open.
                fcntl.flock(file, fcntl.LOCK_UN)


def _to_json(env: Mapping[str, Any]) -> bytes:
    return json.dumps(env, indent=1, ensure_ascii=False).encode()
