"""Shard sets as a user names them: a set, or a prepared folder of two."""

from pathlib import Path

_MANIFEST = "manifest.json"


def set_folders(path: Path) -> list[Path]:
    """The shard sets that `path` stands for: its `train` and `val` where it has them, else `path` itself.

    Whether they are whole is for `ShardSet.open` to say.
    """
    parts = [path / name for name in ("train", "val") if (path / name).is_dir()]
    return parts if parts and not (path / _MANIFEST).exists() else [path]
