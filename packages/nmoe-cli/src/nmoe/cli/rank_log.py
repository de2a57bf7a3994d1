"""What a rank says, kept: in memory until its run has a folder, then in `<run>/logs/rank_<k>.log`."""

import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, cast

_TAIL = 64 << 10
"""Bytes of a rank's errors that are kept to be shown should it fail."""
_IN_MEMORY = 1 << 20


class RankLog:
    """The output of one rank. It grows in a temporary file until `move_to`."""

    def __init__(self, title: str) -> None:
        """`title`: one line, without the time, at the head of what this process adds to the log."""
        self.path: Path | None = None
        """Where the log is; None while it is temporary."""
        self._file = cast(BinaryIO, tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY))  # noqa: SIM115 (see close)
        self._errors = bytearray()
        self._file.write(f"== {title}, {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC\n".encode())

    def write(self, chunk: bytes, *, is_error: bool) -> None:
        """Adds what the rank wrote to its standard output, or error."""
        self._file.write(chunk)
        self._file.flush()  # a log is read while it grows
        if is_error:
            self._errors += chunk
            del self._errors[:-_TAIL]

    def move_to(self, path: Path) -> None:
        """Goes on in the file at `path`, after what it holds."""
        path.parent.mkdir(exist_ok=True)
        with self._file as temporary:
            self._file = open(path, "ab")  # noqa: SIM115 (see close)
            temporary.seek(0)
            self._file.write(temporary.read())
        self._file.flush()
        self.path = path

    @property
    def errors(self) -> bytes:
        """The last of what the rank wrote to its standard error."""
        return bytes(self._errors)

    def close(self) -> None:
        """Closes the file; a temporary one is gone."""
        self._file.close()
