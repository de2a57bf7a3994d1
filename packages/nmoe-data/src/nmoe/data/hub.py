"""A Hugging Face dataset, streamed: nothing is downloaded ahead, and reading goes on from a recorded state."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from nmoe.data.blocks import BLOCK_BYTES, Cut, Position, TextBlock
from nmoe.data.errors import DataError, SourceError
from nmoe.data.remote import Patience
from nmoe.data.sources import Source

_TRANSIENT_STATUS = frozenset({408, 425, 429})
_NETWORK_PACKAGES = ("httpx", "requests", "aiohttp", "urllib3")
_REMEDY = "Check the dataset's name, config, split and revision, and for a private one the login (hf auth login)."

T = TypeVar("T")


class HubSource(Source):
    """The rows of one dataset's column, in the dataset's order; of a folder of data files just as well."""

    def __init__(
        self, name: str, *, text_key: str, config: str | None, split: str, revision: str | None, patience: Patience
    ) -> None:
        self._name = name
        self._text_key = text_key
        self._config = config
        self._split = split
        self._patience = patience
        self._folder = Path(name) if Path(name).is_dir() else None
        # The commit that the revision stands for today: the one that is read, and the one that is gone on with.
        self._revision = None if self._folder else self._patiently(lambda: _commit(name, revision))
        self._dataset = self._patiently(self._load)

    def blocks(self, start: Position | None = None) -> Iterator[Cut]:
        """The blocks from `start` on. After network trouble reading goes on from the last block's end."""
        place = start or {"row": 0, "state": None}
        failures = 0
        while True:
            try:
                for cut in self._read(place):
                    failures = 0
                    place = cut.after
                    yield cut
                return
            except DataError:
                raise
            except Exception as error:
                failures += 1
                self._wait_or_raise(error, failures)

    def __str__(self) -> str:
        return f"dataset {self._name}, split {self._split}"

    def describe(self) -> dict[str, Any]:
        """Name, config, split, commit and column."""
        name = self._folder.name if self._folder else self._name
        return {
            "kind": "hf",
            "name": name,
            "config": self._config,
            "split": self._split,
            "revision": self._revision,
            "text_key": self._text_key,
        }

    def identity(self) -> dict[str, Any]:
        """The description; of a folder also a digest of its files' names, sizes and times of change."""
        if self._folder is None:
            return self.describe()
        digest = hashlib.sha256()
        for path in sorted(path for path in self._folder.rglob("*") if path.is_file()):
            stat = path.stat()
            digest.update(repr((str(path.relative_to(self._folder)), stat.st_size, stat.st_mtime_ns)).encode())
        return self.describe() | {"names, sizes and times of the files": digest.hexdigest()[:16]}

    def _load(self) -> Any:
        import datasets

        # Its own retries last for minutes and do not tell the reason; ours do.
        datasets.config.STREAMING_READ_MAX_RETRIES = 1
        datasets.config.STREAMING_READ_RETRY_INTERVAL = 0
        dataset = datasets.load_dataset(
            self._name, self._config, split=self._split, revision=self._revision, streaming=True
        )
        columns = dataset.column_names or list(next(iter(dataset), {self._text_key: ""}))
        if self._text_key not in columns:
            raise SourceError(
                self._name,
                expected=f"a dataset with a column {self._text_key!r}",
                found=f"the columns {', '.join(map(repr, columns[:8]))}",
                remedy="Name the column of the text.",
            )
        return dataset

    def _read(self, place: Position) -> Iterator[Cut]:
        # A view of its own each time: a dataset keeps the state that it was once given.
        dataset, row = self._dataset.select_columns([self._text_key]), place["row"]
        if place["state"] is not None:
            dataset.load_state_dict(place["state"])
        texts: list[str] = []
        size = 0
        for example in dataset:
            text = example[self._text_key]
            if not isinstance(text, str):
                raise SourceError(
                    f"{self._name}, row {row}",
                    expected=f"text under {self._text_key!r}",
                    found=f"a {type(text).__name__}",
                    remedy="Name the column of the text, or drop such rows first.",
                )
            texts.append(text)
            row += 1
            size += len(text)
            if size >= BLOCK_BYTES:
                yield Cut(TextBlock(texts), {"row": row, "state": dataset.state_dict()}, 0)
                texts, size = [], 0
        if texts:
            yield Cut(TextBlock(texts), {"row": row, "state": dataset.state_dict()}, 0)

    def _patiently(self, ask: Callable[[], T]) -> T:
        failures = 0
        while True:
            try:
                return ask()
            except DataError:
                raise
            except Exception as error:
                failures += 1
                self._wait_or_raise(error, failures)

    def _wait_or_raise(self, error: Exception, failures: int) -> None:
        reason = error.__cause__ or error
        text = " ".join(str(reason).split()) or type(reason).__name__
        if not _is_transient(error):
            raise SourceError(
                self._name, expected="a dataset that can be streamed", found=text, remedy=_REMEDY
            ) from error
        self._patience.wait(self._name, failures, text)


def _commit(name: str, revision: str | None) -> str | None:
    from huggingface_hub import HfApi

    return HfApi().dataset_info(name, revision=revision).sha


def _is_transient(error: Exception) -> bool:
    """Whether asking again may help. By package name: which HTTP client is at work changes from release to release."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(status, int):
        return status >= 500 or status in _TRANSIENT_STATUS
    if isinstance(error, FileNotFoundError) or type(error).__name__ == "OfflineModeIsEnabled":
        return False
    return isinstance(error, ConnectionError | TimeoutError) or type(error).__module__.startswith(_NETWORK_PACKAGES)
