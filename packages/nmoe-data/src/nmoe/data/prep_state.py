"""Unfinished prep on disk: `<output>.partial`, where work goes on after any interruption."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nmoe.data.atomic import DISK_ERRORS, exists_error, sync_folder, write_file
from nmoe.data.errors import PrepRunningError, PrepStateError, WriteError

_VERSION = 1


class Partial:
    """The folder of unfinished work for one output: the sets so far in `data/`, and `progress.json`."""

    def __init__(self, output: Path) -> None:
        self._output = output
        self.path = partial_path(output)
        """The folder."""
        self.data = self.path / "data"
        """Becomes the output."""
        self._state = self.path / "progress.json"

    def load(self, settings: Mapping[str, Any]) -> dict[str, Any] | None:
        """The state that was saved last, None if there is none.

        Raises PrepStateError if it was begun with other settings, or cannot be read.
        """
        try:
            saved = json.loads(self._state.read_bytes())
            if saved["version"] != _VERSION:
                raise ValueError(f"version {saved['version']!r}")
            begun, state = dict(saved["settings"]), dict(saved["state"])
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise PrepStateError(
                str(self._state),
                expected="the state of an unfinished prep",
                found=f"{type(error).__name__}: {error}",
                remedy=f"Delete {self.path} and prepare from the start.",
            ) from error
        for key in sorted({*begun, *settings}):
            was, now = begun.get(key), settings.get(key)
            if was != now:
                raise PrepStateError(
                    str(self.path),
                    expected=f"the {key} that this unfinished prep was begun with ({was})",
                    found=str(now),
                    remedy="Run it with the same settings on the same source, or delete that folder to start anew.",
                )
        return state

    def save(self, settings: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        """Replace the saved state. What it speaks of must be on disk already."""
        content = {"version": _VERSION, "settings": settings, "state": state}
        write_file(self._state, json.dumps(content).encode())

    def publish(self) -> None:
        """Give the data its final name. Raises OutputExistsError if that is taken."""
        sync_folder(self.data)
        try:
            os.rename(self.data, self._output)
        except OSError as error:
            if os.path.lexists(self._output):
                raise exists_error(self._output) from error
            raise
        sync_folder(self._output.parent)
        self.discard()

    def discard(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.path)


def partial_path(output: Path) -> Path:
    """Where unfinished work for `output` is kept."""
    return output.with_name(f"{output.name}.partial")


@contextmanager
def partial_folder(output: Path) -> Iterator[Partial]:
    """The folder of unfinished work for `output`, made or found, and locked for this process.

    Raises OutputExistsError, PrepRunningError if another process holds it, and WriteError, here and from the block,
    for a disk that refuses.
    """
    if output.name in ("", ".."):  # such as `.`: there already, and nothing can be made beside it by its name
        raise exists_error(output)
    partial = Partial(output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with _locked(partial):
            if os.path.lexists(output):
                if not partial.data.exists():
                    partial.discard()  # begun just now, or left by a kill right after the output appeared
                raise exists_error(output)
            yield partial
    except (FileExistsError, NotADirectoryError) as error:
        raise WriteError(
            str(output), expected="a name below folders", found=str(error), remedy="Choose another output."
        ) from error
    except OSError as error:
        if error.errno in DISK_ERRORS:
            raise WriteError(
                str(output),
                expected="a folder that can be written",
                found=str(error),
                remedy="Free some space, or mend the rights, and run the same command again: work so far is kept.",
            ) from error
        raise


@contextmanager
def _locked(partial: Partial) -> Iterator[None]:
    while True:
        partial.path.mkdir(exist_ok=True)
        try:
            handle = open(partial.path / "lock", "a")  # noqa: SIM115 - closed below
        except FileNotFoundError:  # whoever held it removed the folder just now
            continue
        with handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise PrepRunningError(
                    str(partial.path),
                    expected="no other process that prepares this output",
                    found="one that does",
                    remedy="Wait for it, or choose another output.",
                ) from error
            # Whoever held it may have removed the folder before it let go.
            if _is_same(handle.fileno(), partial.path / "lock"):
                yield
                return


def _is_same(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
