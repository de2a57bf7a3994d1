"""Exact deduplication: which documents were seen before, kept on disk so that memory does not grow with them."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt
from nmoe.data.errors import PrepStateError, WriteError
from nmoe.data.tokenized import DIGEST_BYTES

_TABLE = """
    CREATE TABLE IF NOT EXISTS seen (digest BLOB PRIMARY KEY, number INTEGER NOT NULL) WITHOUT ROWID
"""
_CACHE_KIB = 64 * 1024


class SeenDocuments:
    """Digests of documents with the number of the first document that had each, in one SQLite file.

    Used as a context, it closes the file; what came after the last `commit` is lost then.
    """

    def __init__(self, path: Path, n_documents: int) -> None:
        """Open or make the file; what it knows of documents from number `n_documents` on is forgotten.

        Raises, as the other methods do, WriteError for a disk that refuses, and PrepStateError for a damaged file; and
        for a missing one that should know documents.
        """
        self._path = path
        self._next = n_documents
        self._failure: WriteError | None = None
        if n_documents and not path.is_file():
            raise self._damaged("no such file")
        with self._told():
            self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            # Written ahead to a log: a kill at any moment leaves the last commit.
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
            self._connection.execute(_TABLE)
            self._connection.execute("BEGIN")
            self._connection.execute("DELETE FROM seen WHERE number >= ?", (n_documents,))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()

    def first_times(self, digests: bytes) -> npt.NDArray[np.bool_]:
        """For each of the next documents, whether none before had its digest, as (documents,)."""
        count = len(digests) // DIGEST_BYTES
        first = np.zeros(count, np.bool_)
        with self._told():
            for index in range(count):
                row = (digests[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES], self._next + index)
                first[index] = self._connection.execute("INSERT OR IGNORE INTO seen VALUES (?, ?)", row).rowcount
        self._next += count
        return first

    def commit(self) -> None:
        """Make what is known durable."""
        with self._told():
            if self._connection.in_transaction:  # Ctrl-C may have come between these two, and ends with a commit
                self._connection.execute("COMMIT")
            self._connection.execute("BEGIN")

    @contextmanager
    def _told(self) -> Iterator[None]:
        # SQLite has rolled back by then: what came since the last commit is lost, and must not count as known.
        if self._failure is not None:
            raise self._failure
        try:
            yield
        except sqlite3.OperationalError as error:
            self._failure = WriteError(
                str(self._path),
                expected="a file that can be written",
                found=str(error),
                remedy="Free some space, or mend the rights, and run the same command again: work so far is kept.",
            )
            raise self._failure from error
        except sqlite3.DatabaseError as error:
            raise self._damaged(str(error)) from error

    def _damaged(self, found: str) -> PrepStateError:
        return PrepStateError(
            str(self._path),
            expected="the documents that an unfinished prep has seen",
            found=found,
            remedy=f"Delete {self._path.parent} and prepare from the start.",
        )
