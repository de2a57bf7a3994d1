"""Where each key of a TOML text is written: tomllib gives values only, an error should name the line."""

import re
import tomllib
from bisect import bisect_right
from typing import TypeAlias

KeyPath: TypeAlias = tuple[str | int, ...]
"""Keys from the root to a value; an integer is a place in an array."""

_BLANK = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
# Longest delimiters first. A multi-line string may end in up to two quotes of its own before the delimiter.
_STRING = re.compile(
    r'"""(?:[^"\\]|\\.|"(?!"")|""(?!"))*"{3,5}'
    r"|'''(?:[^']|'(?!'')|''(?!'))*'{3,5}"
    r'|"(?:[^"\\]|\\.)*"'
    r"|'[^']*'",
    re.DOTALL,
)
_SCALAR = re.compile(r"[^,\]}#\n]+")


def key_lines(text: str) -> dict[KeyPath, int]:
    """Line, counted from 1, on which each key, table and array element of valid TOML `text` begins."""
    return _Scanner(text.replace("\r\n", "\n")).scan()


class _Scanner:
    """Walks text that tomllib has accepted: it has to find its way, not to check."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.line_ends = [match.start() for match in re.finditer("\n", text)]
        self.lines: dict[KeyPath, int] = {}
        self.table_arrays: dict[KeyPath, int] = {}

    def scan(self) -> dict[KeyPath, int]:
        table: KeyPath = ()
        while self.skip_blank():
            if self.text[self.at] == "[":
                table = self.header()
            else:
                self.pair(table)
        return self.lines

    def skip_blank(self) -> bool:
        """Skips space, line breaks and comments; whether anything is left."""
        match = _BLANK.match(self.text, self.at)
        assert match is not None
        self.at = match.end()
        return self.at < len(self.text)

    def note(self, path: KeyPath, start: int) -> None:
        line = bisect_right(self.line_ends, start - 1) + 1
        # `a.b.c = 1` brings forth a and a.b too, unless they have a place already.
        for length in range(1, len(path)):
            self.lines.setdefault(path[:length], line)
        self.lines[path] = line

    def header(self) -> KeyPath:
        start = self.at
        is_array = self.text.startswith("[[", start)
        self.at += 2 if is_array else 1
        keys = self.keys()
        self.skip_blank()
        self.at += 2 if is_array else 1
        table = self.inside_arrays(keys[:-1])
        table += (keys[-1],)
        if is_array:
            place = self.table_arrays[table] = self.table_arrays.get(table, -1) + 1
            table += (place,)
        self.note(table, start)
        return table

    def inside_arrays(self, keys: KeyPath) -> KeyPath:
        """`keys` with the place of the last element after each array of tables: where `[a.b]` leads under `[[a]]`."""
        path: KeyPath = ()
        for key in keys:
            path += (key,)
            if path in self.table_arrays:
                path += (self.table_arrays[path],)
        return path

    def pair(self, table: KeyPath) -> None:
        start = self.at
        path = table + self.keys()
        self.skip_blank()
        self.at += 1  # the equals sign
        self.note(path, start)
        self.value(path)

    def keys(self) -> KeyPath:
        """A dotted key, up to what follows it."""
        keys: list[str | int] = []
        while True:
            self.skip_blank()
            bare = _BARE_KEY.match(self.text, self.at)
            match = bare or _STRING.match(self.text, self.at)
            assert match is not None
            self.at = match.end()
            keys.append(match[0] if bare else tomllib.loads(f"key = {match[0]}")["key"])
            self.skip_blank()
            if self.text[self.at] != ".":
                return tuple(keys)
            self.at += 1

    def value(self, path: KeyPath) -> None:
        self.skip_blank()
        first = self.text[self.at]
        if first == "[":
            self.at += 1
            place = 0
            while self.skip_blank() and self.text[self.at] != "]":
                self.note((*path, place), self.at)
                self.value((*path, place))
                place += 1
                self.skip_comma()
            self.at += 1
        elif first == "{":
            self.at += 1
            while self.skip_blank() and self.text[self.at] != "}":
                self.pair(path)
                self.skip_comma()
            self.at += 1
        else:
            match = _STRING.match(self.text, self.at) or _SCALAR.match(self.text, self.at)
            assert match is not None
            self.at = match.end()

    def skip_comma(self) -> None:
        if self.skip_blank() and self.text[self.at] == ",":
            self.at += 1
