"""Positions against tomllib: every value that it reads has a line, and that line shows it."""

import tomllib

import pytest
from nmoe.cli.toml_positions import key_lines

AWKWARD = '''\
# comment = 1
title = "a # no comment = [x]"  # real comment
"quoted key" . 'a.b' = 'lit\\eral'

[model]     # [not.a.table]
dim = 1
yarn.factor = 2.0
yarn . beta = 3
text = """
[fake]
dim = 9 \\"""
quotes ends with two ""
"""""
raw = \'\'\'
x = 1 \'\'
\'\'\'
list = [ 1, # one ]
  [ "a]", 'b' ],
  { k = 1, "k 2" = [ 2 ] },
]
when = 1979-05-27 07:32:00
inline = { a.b = 1, c = { d = "}" } }

[[runs]]
name = "first"
[runs.inner]
x = 1
[[runs]]
name = "second"
[[runs.deep]]
y = 1
[[runs.deep]]
y = 2
[runs.deep.most]
z = 3
[deep."x.y".end]
last = false'''


def flatten(value, path=()):
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from flatten(item, (*path, key))


def test_every_value_that_tomllib_reads_has_a_line():
    assert set(key_lines(AWKWARD)) == set(flatten(tomllib.loads(AWKWARD)))


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        (("title",), 'title = "a'),
        (("quoted key", "a.b"), '"quoted key"'),
        (("model",), "[model]"),
        (("model", "yarn", "factor"), "yarn.factor"),
        (("model", "yarn", "beta"), "yarn . beta"),
        (("model", "text"), 'text = """'),
        (("model", "raw"), "raw = "),
        (("model", "list", 0), "list = [ 1"),
        (("model", "list", 1), '[ "a]"'),
        (("model", "list", 2, "k 2"), "{ k = 1"),
        (("model", "when"), "when ="),
        (("model", "inline", "c", "d"), "inline ="),
        (("runs", 0, "name"), 'name = "first'),
        (("runs", 0, "inner", "x"), "x = 1"),
        (("runs", 1, "name"), 'name = "second'),
        (("runs", 1, "deep", 1, "y"), "y = 2"),
        (("runs", 1, "deep", 1, "most", "z"), "z = 3"),
        (("deep", "x.y", "end"), "[deep."),
        (("deep", "x.y", "end", "last"), "last = false"),
    ],
)
@pytest.mark.parametrize("line_break", ["\n", "\r\n"])
def test_the_line_shows_the_key(path, shown, line_break):
    lines = key_lines(AWKWARD.replace("\n", line_break))
    assert AWKWARD.splitlines()[lines[path] - 1].strip().startswith(shown)


@pytest.mark.parametrize("text", ["", "\n", "# only a comment", "a = 1", "[a]", "a = []", "a = {}", "a = [\n]\n"])
def test_small_texts(text):
    assert set(key_lines(text)) == set(flatten(tomllib.loads(text)))
