"""`n` as a user calls it, in this process, and a small valid configuration."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from nmoe.cli.app import run
from nmoe.cli.console import make_console
from nmoe.cli.context import Context

SMALL = """\
[model]
vocab_size = 257
dim = 32
n_layers = 2
n_heads = 2
kv_lora_rank = 16
qk_nope_head_dim = 8
qk_rope_head_dim = 8
v_head_dim = 8
inter_dim = 64
moe_inter_dim = 16
n_routed_experts = 4
n_activated_experts = 2

[train]
steps = 10
batch_size = 8
micro_batch_size = 4
seq_len = 16

[optim]
lr_dense = 1e-3
lr_router = 1e-3
lr_expert = 1e-3

[schedule]
hold_tokens = 1280

[data]
tokenizer = "byte"
corpus = "pydoc"

[runtime]
device = "cpu"
precision = "fp32"
kernels = "reference"
"""


@dataclass
class Outcome:
    """How a call of `n` ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def data_root(tmp_path: Path) -> Path:
    """Where the fixture `n` keeps runs."""
    return tmp_path / "root"


@pytest.fixture
def n(data_root: Path) -> Callable[..., Outcome]:
    def call(*arguments: object) -> Outcome:
        out, err = io.StringIO(), io.StringIO()
        context = Context(data_root, {}, make_console(out), make_console(err))
        code = run([str(argument) for argument in arguments], context)
        return Outcome(code, out.getvalue(), err.getvalue())

    return call


@pytest.fixture
def config_file(tmp_path: Path) -> Callable[..., Path]:
    """Writes a TOML file (by default a small valid configuration), with replacements, and returns its path."""

    def write(*replacements: tuple[str, str], text: str = SMALL, name: str = "small.toml") -> Path:
        for old, new in replacements:
            assert old in text, f"{old!r} is not in the text to change"
            text = text.replace(old, new)
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


@pytest.fixture
def prepared(n: Callable[..., Outcome], tmp_path: Path) -> Path:
    """Three short documents as bytes, one of them for validation."""
    text = tmp_path / "text"
    text.mkdir()
    for name in ("a", "b", "c"):
        (text / f"{name}.txt").write_text(f"{name}: the quick brown fox jumps over the lazy dog, ä. " * 40)
    output = tmp_path / "tokens"
    assert n("data", "prep", text, "--output", output).code == 0
    return output
