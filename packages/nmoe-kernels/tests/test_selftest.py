"""The selftest passes where the ops are right, and fails where one is wrong."""

import dataclasses
from typing import Any

import pytest
import torch
from nmoe.kernels import selftest


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


@pytest.mark.parametrize(
    ("name", "check", "change"),
    [
        ("experts", "layer", lambda out: out * (1 + 1e-4)),
        ("route", "routing", lambda routing: routing._replace(gate_TK=routing.gate_TK * 1.0001)),
        ("route", "routing", lambda routing: routing._replace(expert_TK=routing.expert_TK.flip(1))),
        ("index_rows", "routing", lambda index: index._replace(row_TK=index.row_TK.flip(0))),
        ("attention", "attention", lambda out: out * (1 + 1e-4)),
        ("balance_loss", "balance_loss", lambda loss: loss * (1 + 1e-4)),
    ],
)
def test_a_wrong_op_fails(
    name: str,
    check: str,
    change: Any,
    reference: selftest.Setting,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ops = dataclasses.replace(reference.ops, **{name: wrong(getattr(reference.ops, name), change)})
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
