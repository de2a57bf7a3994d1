"""The selftest passes where the ops are right, and fails where one is wrong."""

import dataclasses
from typing import Any

import pytest
import torch
from nmoe.kernels import selftest
from nmoe.kernels.linear import linear
from nmoe.kernels.ops import Ops


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> selftest.Setting:
    """What the selftest uses, which a test may replace."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return selftest.choose_setting()[0]


def test_reference_passes_and_tells_what_was_skipped(
    reference: selftest.Setting, capsys: pytest.CaptureFixture[str]
) -> None:
    assert selftest.main([]) == 0
    told = capsys.readouterr().out
    assert "skipped: the native tier: found no CUDA GPU" in told
    for name in selftest.CHECKS:
        assert f"ok    {name}" in told


def wrong(op: Any, change: Any) -> Any:
    return lambda *args, **kwargs: change(op(*args, **kwargs))


def off(out: torch.Tensor) -> torch.Tensor:
    return out * (1 + 1e-4)


def nothing(*args: Any, **kwargs: Any) -> None:
    """In place of an op that updates what it is given."""


WRONG: list[tuple[str, str, Any]] = [
    ("attention", "attention", off),
    ("attention", "window_attention", off),
    ("rms_norm", "rms_norm", off),
    ("add_rms_norm", "add_rms_norm", lambda outs: (off(outs[0]), outs[1])),
    ("add_rms_norm", "add_rms_norm", lambda outs: (outs[0], off(outs[1]))),
    ("qkv_heads", "qkv_heads", lambda heads: (heads[1], heads[0], heads[2])),
    ("qkv_heads", "qkv_heads", lambda heads: (*heads[:2], off(heads[2]))),
    ("mla_heads", "mla_heads", lambda heads: (off(heads[0]), *heads[1:])),
    ("route", "routing", lambda routing: routing._replace(gate_TK=routing.gate_TK * 1.0001)),
    ("route", "routing", lambda routing: routing._replace(expert_TK=routing.expert_TK.flip(1))),
    ("index_rows", "routing", lambda index: index._replace(row_TK=index.row_TK.flip(0))),
    ("balance_loss", "balance_loss", off),
    ("experts", "layer", off),
    ("rope", "rope", off),
    ("swiglu", "swiglu", off),
    ("linear_cross_entropy", "cross_entropy", off),
    ("adamw_", "adamw", nothing),
    ("global_norm", "muon", off),
    ("muon_momentum_", "muon", off),
    ("newton_schulz", "muon", off),
    ("muon_apply_", "muon", nothing),
]
"""An op, the check that fails, and what is done to the op's results, or instead of the op."""


def test_every_op_has_a_mistake_that_is_found() -> None:
    """With the next test: a check of every op."""
    assert {name for name, _, _ in WRONG} == {field.name for field in dataclasses.fields(Ops)} - {"tier"}


@pytest.mark.parametrize(("name", "check", "change"), WRONG)
def test_a_wrong_op_fails(
    name: str,
    check: str,
    change: Any,
    reference: selftest.Setting,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    op = nothing if change is nothing else wrong(getattr(reference.ops, name), change)
    ops = dataclasses.replace(reference.ops, **{name: op})
    monkeypatch.setattr(selftest, "CHECKS", {check: selftest.CHECKS[check]})
    monkeypatch.setattr(selftest, "choose_setting", lambda: (dataclasses.replace(reference, ops=ops), []))
    assert selftest.main([]) == 1
    assert f"FAIL  {check}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("finding", "change"),
    [
        ("router logits", lambda x, weight: (x @ weight.T) * (1 + 1e-4)),
        ("router dx", lambda x, weight: x.detach() @ weight.T + 0 * x.sum()),
        ("router dweight", lambda x, weight: x @ weight.detach().T + 0 * weight.sum()),
        ("layer dx", lambda x, weight: x.detach() @ weight.T + 0 * x.sum()),
        ("layer drouter", lambda x, weight: x @ weight.detach().T + 0 * weight.sum()),
    ],
)
def test_a_wrong_router_fails(
    finding: str,
    change: Any,
    reference: selftest.Setting,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(selftest, "router_logits", change)
    assert selftest.main([]) == 1
    assert f"FAIL  {finding}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("finding", "change"),
    [
        ("linear out", lambda x, weight: linear(x, weight) * (1 + 1e-4)),
        ("linear dx", lambda x, weight: linear(x.detach(), weight) + 0 * x.sum()),
        ("linear dweight", lambda x, weight: linear(x, weight.detach()) + 0 * weight.sum()),
    ],
)
def test_a_wrong_linear_fails(
    finding: str,
    change: Any,
    reference: selftest.Setting,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(selftest, "linear", change)
    assert selftest.main([]) == 1
    assert f"FAIL  {finding}" in capsys.readouterr().out


def test_gradients_that_are_added_to_garbage_fail(
    reference: selftest.Setting, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An op that ignores `main_grad_stale`."""
    monkeypatch.setattr("nmoe.kernels.reference.experts.claim", lambda weight: (weight.main_grad, True))
    assert selftest.main([]) == 1
    assert "FAIL  layer dw13" in capsys.readouterr().out


def test_an_op_that_raises_fails_alone(
    reference: selftest.Setting, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no such kernel")

    ops = dataclasses.replace(reference.ops, adamw_=broken)
    monkeypatch.setattr(selftest, "choose_setting", lambda: (dataclasses.replace(reference, ops=ops), []))
    assert selftest.main([]) == 1
    told = capsys.readouterr().out
    assert "FAIL  adamw: RuntimeError: no such kernel" in told
    assert "ok    attention out" in told


def test_nan_is_no_agreement() -> None:
    assert not selftest.compare("x", torch.full((3,), torch.nan), torch.ones(3).double(), 1e9).passed


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, found none")
def test_native_passes(capsys: pytest.CaptureFixture[str]) -> None:
    setting, skipped = selftest.choose_setting()
    if setting.ops.tier != "native":
        pytest.skip(skipped[0])
    code = selftest.main([])
    assert code == 0, capsys.readouterr().out
