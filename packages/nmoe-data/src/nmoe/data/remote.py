"""Files on an HTTP server, read as if they were local: seekable, and patient with the network."""

import io
import ssl
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from html.parser import HTMLParser
from http.client import HTTPException, HTTPResponse
from typing import TYPE_CHECKING
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urldefrag, urljoin, urlsplit
from urllib.request import Request, urlopen

from nmoe.data.errors import NetworkError, SourceChangedError, SourceError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

RETRIES = 5
"""Attempts after the first, without a byte gained in between, before a read gives up."""
TIMEOUT_S = 60.0
"""Silence after which an attempt counts as failed."""

_TRANSIENT_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
_SKIP = 1 << 20  # bytes that are read and dropped rather than asked for anew
_WHOLE_REMEDY = "Check the address; if it is right, fetch the file by other means and give its path."

Notice = Callable[[str], None]


def is_url(name: str) -> bool:
    """Whether `name` is an address that this module reads."""
    return name.startswith(("http://", "https://"))


def silent(message: str) -> None:
    """Tell nobody."""


@dataclass(frozen=True)
class Patience:
    """How network trouble is met: told to `notice`, then waited out, 1 s first and twice as long each time."""

    notice: Notice = silent
    sleep: Callable[[float], None] = time.sleep

    def wait(self, what: str, attempt: int, reason: str) -> None:
        """Tell the reason and wait before attempt number `attempt` (from 1), or raise NetworkError past the last."""
        if attempt > RETRIES:
            raise NetworkError(
                what,
                expected="the server's answer",
                found=f"{reason}, {attempt} times",
                remedy="Run the same command again once the network is back: the work so far is kept.",
            )
        pause = 2.0 ** (attempt - 1)
        self.notice(f"{what}: {reason}; attempt {attempt} of {RETRIES} follows in {pause:.0f} s")
        self.sleep(pause)


@dataclass(frozen=True)
class RemoteStat:
    """What a server says of a file."""

    size: int | None
    """Bytes, where the server tells."""
    mark: str
    """Its ETag, else the time of its last change, else nothing: tells whether the file is still the same."""


class RemoteFile(io.RawIOBase):
    """One file behind a URL, for reading.

    Reads from one open answer as long as they go forward; a seek asks anew from there. Trouble is waited out and
    reading goes on at the byte where it stopped. Raises NetworkError when patience ends, SourceError for what the
    server refuses, SourceChangedError when the file is another one than at first.
    """

    def __init__(self, url: str, patience: Patience) -> None:
        self._url = url
        self._patience = patience
        self._position = 0
        self._answer: HTTPResponse | None = None
        self._answer_at = 0
        self._known: RemoteStat | None = None
        self._failures = 0
        self._connect()

    @property
    def stat(self) -> RemoteStat:
        """What the server said at first."""
        assert self._known is not None, "known since the first answer"
        return self._known

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True; on a server that sends whole files only, going back costs reading from the start."""
        return True

    def tell(self) -> int:
        """The position of the next byte."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move; nothing is asked of the server until the next read."""
        if whence == io.SEEK_END:
            if self.stat.size is None:
                raise self._refused("a server that tells the file's size", "none told")
            offset += self.stat.size
        elif whence == io.SEEK_CUR:
            offset += self._position
        self._position = offset
        return offset

    def readinto(self, buffer: "WriteableBuffer") -> int:
        """Fill as much of `buffer` as came; 0 at the file's end."""
        view = memoryview(buffer).cast("B")
        while True:
            if self.stat.size is not None and self._position >= self.stat.size:
                return 0
            try:
                answer = self._answer_here()
                count = answer.readinto(view)
            except (HTTPException, OSError) as error:
                self._failed(_reason(error))
                continue
            if count == 0 and view.nbytes and self.stat.size is not None:
                self._failed(f"the connection ended at byte {self._position} of {self.stat.size}")
                continue
            self._position += count
            self._answer_at += count
            self._failures = 0
            return count

    def close(self) -> None:
        """Hang up."""
        self._hang_up()
        super().close()

    def _answer_here(self) -> HTTPResponse:
        gap = self._position - self._answer_at
        if self._answer is not None and not 0 <= gap <= _SKIP:
            self._hang_up()
        if self._answer is None:
            self._connect()
        assert self._answer is not None, "connecting gives an answer or raises"
        while self._answer_at < self._position:
            dropped = len(self._answer.read(min(_SKIP, self._position - self._answer_at)))
            if not dropped:
                raise ConnectionError("the connection ended early")
            self._answer_at += dropped
        return self._answer

    def _connect(self) -> None:
        while True:
            try:
                headers = {"Range": f"bytes={self._position}-"} if self._position else {}
                self._answer = _ask(self._url, headers)
                break
            except (HTTPException, OSError) as error:
                self._failed(_reason(error))
        answer = self._answer
        self._answer_at = self._position if answer.status == 206 else 0
        stat = _stat(answer, self._answer_at)
        if self._known is None:
            self._known = stat
        elif self._known != stat:
            raise SourceChangedError(
                self._url,
                expected=f"the file as it was at first ({_spell(self._known)})",
                found=_spell(stat),
                remedy="Prepare it from the start, from a copy that nothing writes to.",
            )

    def _failed(self, reason: str) -> None:
        self._hang_up()
        self._failures += 1
        self._patience.wait(self._url, self._failures, reason)

    def _hang_up(self) -> None:
        if self._answer is not None:
            with suppress(OSError, HTTPException):
                self._answer.close()
            self._answer = None

    def _refused(self, expected: str, found: str) -> SourceError:
        return SourceError(self._url, expected=expected, found=found, remedy=_WHOLE_REMEDY)


def remote_names(pattern: str, patience: Patience) -> list[str]:
    """The addresses that match `pattern`, whose last part may hold `*`, `?` and `[…]`, sorted.

    HTTP knows no listing: what counts is the links in the folder's index page. Raises SourceError if none matches.
    """
    folder, _, wanted = pattern.rpartition("/")
    with io.BufferedReader(RemoteFile(folder + "/", patience)) as file:
        links = _Links()
        links.feed(file.read().decode(errors="replace"))
    found = set()
    for link in links.targets:
        address = urldefrag(urljoin(folder + "/", link)).url
        parent, _, name = address.rpartition("/")
        if parent == folder and fnmatchcase(unquote(urlsplit(name).path), unquote(wanted)):
            found.add(address)
    if not found:
        raise SourceError(
            pattern,
            expected="links that match in the folder's index page",
            found=f"none among {len(links.targets)}",
            remedy="Give the addresses one by one.",
        )
    return sorted(found)


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.targets: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.targets += [value for name, value in attrs if tag == "a" and name == "href" and value]


def _ask(url: str, headers: dict[str, str]) -> HTTPResponse:
    """The server's answer. Raises SourceError for what asking again would not mend."""
    try:
        # Compressed on the way, a file would have other positions and another length.
        return urlopen(Request(url, headers={"Accept-Encoding": "identity", **headers}), timeout=TIMEOUT_S)
    except HTTPError as error:
        if error.code in _TRANSIENT_STATUS:
            raise
        found = f"HTTP status {error.code} {error.reason}"
        raise SourceError(url, expected="a file on the server", found=found, remedy=_WHOLE_REMEDY) from error
    except URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            found = str(error.reason)
            raise SourceError(url, expected="a server of known identity", found=found, remedy=_WHOLE_REMEDY) from error
        raise


def _stat(answer: HTTPResponse, start: int) -> RemoteStat:
    mark = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
    total = answer.headers.get("Content-Range", "").rpartition("/")[2]
    length = answer.headers.get("Content-Length")
    size = int(total) if total.isdigit() else start + int(length) if length else None
    return RemoteStat(size, mark)


def _spell(stat: RemoteStat) -> str:
    return ", ".join(part for part in (f"{stat.size} bytes", stat.mark) if part)


def _reason(error: Exception) -> str:
    if isinstance(error, HTTPError):
        return f"HTTP status {error.code} {error.reason}"
    if isinstance(error, URLError):
        return str(error.reason)
    return str(error) or type(error).__name__
