"""The writer against tomllib."""

import math
import tomllib
from pathlib import Path

import pytest
from nmoe.cli.toml_writer import dump_toml

TREE = {
    "top": 1,
    "model": {
        "dim": 128,
        "big": 2**62,
        "negative": -3,
        "tiny": 1e-08,
        "huge": 1e300,
        "whole": 50000.0,
        "third": 1 / 3,
        "yes": True,
        "no": False,
        "names": ["a", "b"],
        "empty": [],
        "yarn": {"factor": 4.0, "deeper": {"x": 1}},
    },
    "blank": {},
    "awkward key": {"a.b": 'quotes " and \\ and \n\t\x00\x1f\x7f and é — 😀 and ${x}'},
}


def test_what_is_written_reads_back_equal_with_the_same_types():
    back = tomllib.loads(dump_toml(TREE))
    assert back == TREE
    assert type(back["model"]["whole"]) is float
    assert type(back["model"]["yes"]) is bool


def test_infinity_reads_back():
    assert tomllib.loads(dump_toml({"x": math.inf})) == {"x": math.inf}


def test_paths_and_tuples_become_what_toml_has():
    assert tomllib.loads(dump_toml({"s": {"path": Path("a/b"), "pair": (1, 2)}})) == {
        "s": {"path": "a/b", "pair": [1, 2]}
    }


def test_none_is_refused_by_name_of_the_rule():
    with pytest.raises(TypeError, match="leave what is unset out"):
        dump_toml({"s": {"x": None}})
