"""Folders and files that appear whole or not at all."""

import errno
import os
import platform
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nmoe.data.errors import OutputExistsError, WriteError

DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO})
"""Of a disk that refuses to be written to."""


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Give a temporary folder beside `output` that takes its name once the block ends without an error.

    After an error the temporary folder is removed; what a killed process left is removed by the next call for the same
    output. Raises OutputExistsError if `output` exists, before or after the block, and WriteError for a full disk.
    """
    if os.path.lexists(output):
        raise exists_error(output)
    prefix = f".{output.name}.tmp-{platform.node()}-"
    building = output.with_name(f"{prefix}{os.getpid()}-{secrets.token_hex(4)}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(output.parent, prefix)
        building.mkdir()
        yield building
        sync_folder(building)
        os.rename(building, output)
        sync_folder(output.parent)
    except OSError as error:
        shutil.rmtree(building, ignore_errors=True)
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR) and os.path.lexists(output):
            raise exists_error(output) from error
        if error.errno in DISK_ERRORS:
            raise WriteError(
                str(output),
                expected="a folder that can be written",
                found=str(error),
                remedy="Free some space or choose another output; nothing was left behind.",
            ) from error
        raise
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def sync_folder(folder: Path) -> None:
    """Make the folder's entries durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_file(path: Path, content: bytes) -> None:
    """Write `content` under a temporary name, sync it, and rename it to `path`."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as handle:
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def _remove_abandoned(parent: Path, prefix: str) -> None:
    # The host is part of the name: on a shared file system another host's process ids say nothing here.
    for folder in parent.iterdir():
        process = folder.name.removeprefix(prefix).partition("-")[0]
        if folder.name.startswith(prefix) and process.isdigit() and not _alive(int(process)):
            shutil.rmtree(folder, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def exists_error(output: Path) -> OutputExistsError:
    """The error about an output that is there already."""
    return OutputExistsError(
        str(output),
        expected="a name that is still free",
        found="something there already",
        remedy="Remove it or choose another output; nothing is overwritten.",
    )
