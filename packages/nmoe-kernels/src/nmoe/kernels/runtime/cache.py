"""Kernels on disk: `<folder>/<arch>/<name>-<key>.cubin`, and beside each a .json that says what it is.

A key is a hash of all that the machine code depends on, so that nothing in a folder is ever out of date. Files are
published whole and by renaming, without locks: processes that compile the same kernel at once both succeed.
"""

import hashlib
import json
import os
import tempfile
import threading
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nmoe.kernels.runtime.cuda_source import CudaSource
from nmoe.kernels.runtime.nvrtc import OPTIONS, KernelCompileError, compile_cubin, nvrtc_version
from nmoe.kernels.runtime.resources import KernelResources, kernel_resources, with_spills

_KEY_DIGITS = 12
"""Of the key in a file's name; the .json has the whole key, and it is checked."""


@dataclass(frozen=True)
class CachedKernel:
    """A kernel's machine code."""

    cubin: bytes
    resources: KernelResources
    """Of its entry."""
    seconds: float
    """That its compile took; 0 if it was found in the cache."""
    path: Path | None
    """Its file; None if the folder cannot be written."""


class KernelCache:
    """Compiled kernels in one folder, and in memory for this process.

    Args:
        folder: is made when a kernel is first written. It may be read-only; a kernel that cannot be written is a
            warning, and stays in memory.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._memory: dict[str, CachedKernel] = {}
        self._lock = threading.Lock()

    def get(self, source: CudaSource, arch: str) -> CachedKernel:
        """The kernel from memory, from the folder, or compiled now.

        Raises:
            KernelCompileError: the source has errors.
        """
        key = kernel_key(source, arch)
        with self._lock:
            known = self._memory.get(key)
        if known is None:
            known = self._read(source, arch, key) or self._compile(source, arch, key)
            with self._lock:
                self._memory[key] = known
        return known

    def path(self, source: CudaSource, arch: str, key: str) -> Path:
        """Where the kernel of that key is."""
        return self.folder / arch / f"{source.name}-{key[:_KEY_DIGITS]}.cubin"

    def _read(self, source: CudaSource, arch: str, key: str) -> CachedKernel | None:
        path = self.path(source, arch, key)
        try:
            described = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            cubin = path.read_bytes()
            whole = described["key"] == key and described["sha256"] == hashlib.sha256(cubin).hexdigest()
            resources = KernelResources(**described["resources"])
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            _warn(f"cannot read kernel {path}: {type(error).__name__}: {error}; it is compiled again")
            return None
        if not whole:
            _warn(f"kernel {path} is not what was written there (checksum or key differs); it is compiled again")
            return None
        return CachedKernel(cubin, resources, 0.0, path)

    def _compile(self, source: CudaSource, arch: str, key: str) -> CachedKernel:
        start = time.perf_counter()
        compiled = compile_cubin(source, arch)
        seconds = time.perf_counter() - start
        found = {kernel.name: kernel for kernel in with_spills(kernel_resources(compiled.cubin), compiled.log)}
        if source.entry not in found:
            raise KernelCompileError(
                source.name, arch, f'no entry {source.entry}, but {sorted(found)}: declare it extern "C" __global__'
            )
        resources = found[source.entry]
        described = {
            "kernel": source.name,
            "arch": arch,
            "file": source.file,
            "entry": source.entry,
            "defines": dict(source.defines),
            "options": OPTIONS,
            "nvrtc": nvrtc_version(),
            "key": key,
            "sha256": hashlib.sha256(compiled.cubin).hexdigest(),
            "seconds": round(seconds, 3),
            "resources": asdict(resources),
            "log": compiled.log.splitlines(),
        }
        return CachedKernel(
            compiled.cubin, resources, seconds, _publish(self.path(source, arch, key), compiled.cubin, described)
        )


def kernel_key(source: CudaSource, arch: str) -> str:
    """SHA-256, in hexadecimal, over all that the machine code depends on."""
    parts = [source.text(), source.file, source.entry, list(source.defines), arch, OPTIONS, nvrtc_version()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def default_cache_dir() -> Path:
    """`$NMOE_KERNEL_CACHE`, else `nmoe/kernels` in the user's cache folder (`$XDG_CACHE_HOME`, or `~/.cache`)."""
    chosen = os.environ.get("NMOE_KERNEL_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "nmoe" / "kernels"


_current: KernelCache | None = None


def current_cache() -> KernelCache:
    """The cache that this process uses."""
    return _current or set_cache_dir(None)


def set_cache_dir(folder: str | Path | None) -> KernelCache:
    """Makes kernels that are not loaded yet come from `folder`; None: from `default_cache_dir()`."""
    global _current  # noqa: PLW0603  # the one setting of a process
    _current = KernelCache(default_cache_dir() if folder is None else Path(folder))
    return _current


def _publish(path: Path, cubin: bytes, described: dict[str, Any]) -> Path | None:
    """The .json comes last: where there is none, there is no kernel yet."""
    text = (json.dumps(described, indent=2) + "\n").encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for target, content in ((path, cubin), (path.with_suffix(".json"), text)):
            _write_whole(target, content)
    except OSError as error:
        _warn(
            f"cannot keep kernel {path}: {error.strerror or error}; it is compiled again by the next process: make the "
            "folder writable, or name another in NMOE_KERNEL_CACHE"
        )
        return None
    return path


def _write_whole(target: Path, content: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)
