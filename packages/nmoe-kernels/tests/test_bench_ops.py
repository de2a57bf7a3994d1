"""`bench ops`: what a case says it moves and computes, what the command writes, and that a failing op is told."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from nmoe.kernels.bench import machine, op_attention, op_case, op_report, op_timing, ops
from nmoe.kernels.bench.__main__ import main
from nmoe.kernels.bench.op_attention import attention, visible_pairs
from nmoe.kernels.bench.op_case import Case, Peer, Run, Setting, Work
from nmoe.kernels.bench.op_cases import CASES, OPS, cases_of
from nmoe.kernels.bench.op_cross_entropy import linear_cross_entropy
from nmoe.kernels.bench.op_optimizer import adamw, global_norm, newton_schulz
from nmoe.kernels.bench.op_rows import (
    add_rms_norm,
    balance_loss,
    combine,
    mla_heads,
    qkv_heads,
    rms_norm,
    rope,
    route,
    swiglu,
)
from nmoe.kernels.bench.op_timing import Rates, copies_of, repeats_of, same_bits
from nmoe.kernels.bench.ops import Bench
from nmoe.kernels.bench.timing import Timing
from nmoe.kernels.errors import KernelError
from nmoe.kernels.ops import Ops, select_ops
from torch.utils.flop_counter import FlopCounterMode

RATES = Rates(copy_bytes_per_s=4e12, matmul_flop_per_s=800e12)
L2 = 50 << 20


@pytest.fixture
def setting(ops: Ops) -> Setting:
    """The reference on the CPU, whose cases are built as a GPU's are."""
    return Setting(ops, "cpu")


def sizes(cases: Sequence[Case]) -> dict[str, int]:
    return {case.part: case.work.bytes for case in cases}


def test_bytes_are_those_counted_by_hand() -> None:
    """T, D, … so small that each tensor is written out: elements times bytes."""
    assert sizes(rms_norm(3, 8)) == {
        "forward": 24 * 2 + 8 * 2 + 24 * 2,  # x, gain; out
        "backward": 24 * 2 + 24 * 2 + 8 * 2 + 24 * 2 + 8 * 4,  # x, dout, gain; dx, dgain
    }
    assert sizes(add_rms_norm(3, 8)) == {
        "forward": 2 * 24 * 2 + 8 * 2 + 2 * 24 * 2,  # x, delta, gain; sum, norm
        "backward": 3 * 24 * 2 + 8 * 2 + 24 * 2 + 8 * 4,  # both gradients, sum, gain; dx, dgain
    }
    # B 2, S 3, H 2, d 4: q and k (12, 4), tables (3, 2), gains; q and k. Three gradients, q and k; dqkv, dgains.
    assert sizes(qkv_heads(2, 3, 2, 4)) == {
        "forward": 2 * 48 * 2 + 2 * 6 * 4 + 2 * 4 * 2 + 2 * 48 * 2,
        "backward": (3 + 2) * 48 * 2 + 2 * 6 * 4 + 2 * 4 * 2 + 3 * 48 * 2 + 2 * 4 * 4,
    }
    both = 48 * 2 + 48 * 2 + 6 * 4 + 6 * 4  # x (2, 3, 2, 4); out; cos and sin (3, 2)
    assert sizes(rope(2, 3, 2, 4)) == {"forward": both, "backward": both}
    assert sizes(swiglu(3, 8)) == {"forward": 48 * 2 + 24 * 2, "backward": 48 * 2 + 24 * 2 + 48 * 2}
    # B 1, S 3, H 2, n 4, r 2, v 5: q (6, 6), keys (6, 4), shared key (3, 2), tables (3, 1); q and k (6, 6).
    assert sizes(mla_heads(1, 3, 2, 4, 2, 5)) == {
        "forward": (36 + 24 + 6) * 2 + 2 * 3 * 4 + (36 + 36) * 2,
        # dq, dk (6, 6), dv (6, 5); dq (6, 6), the expansion's (6, 9), the shared key's (3, 2).
        "backward": (36 + 36 + 30) * 2 + 2 * 3 * 4 + (36 + 54 + 6) * 2,
    }
    # T 5, E 4, K 2: logits, bias; expert, gate, score; order, token, place; offsets.
    assert sizes(route(5, 4, 2)) == {
        "forward + index": (20 + 4 + 3 * 10 + 3 * 10 + 5) * 4,
        "backward": (10 + 10 + 10 + 20) * 4,  # dgate, expert, score; dlogits
    }
    # T 6, E 4, K 2: logits, experts; loss. Its gradient, logits; dlogits.
    assert sizes(balance_loss(6, 4, 2, 3)) == {"forward": (24 + 12 + 1) * 4, "backward": (1 + 24 + 24) * 4}
    # T 5, D 8, F 200, E 4, K 2: rows (10, 8), places; out. Two partial sums a row, one gradient.
    assert sizes(combine(5, 8, 200, 4, 2)) == {
        "forward": 80 * 2 + 10 * 4 + 40 * 2,
        "backward": 80 * 2 + 10 * 4 + 40 * 2 + 2 * 10 * 4 + 10 * 4,
    }
    # B 1, H 2, S 4, d 6, v 5: q, k (8, 6), v (8, 5); out (8, 5), log-sum-exps.
    expected = {
        "forward": (48 + 48 + 40) * 2 + 40 * 2 + 8 * 4,
        "backward": (48 + 48 + 40 + 40 + 40) * 2 + 8 * 4 + (48 + 48 + 40) * 2,
    }
    assert sizes(attention(1, 2, 4, 6, 5)) == sizes(attention(1, 2, 4, 6, 5, 2)) == expected
    # T 3, D 8, V 10: x, head, targets; dx, dhead in fp32. Two rows: logits, dlogits, targets, losses.
    assert sizes(linear_cross_entropy(3, 8, 10, chunk=2)) == {
        "both": 24 * 2 + 80 * 2 + 3 * 8 + 24 * 2 + 80 * 4,
        "rows": 20 * 4 + 20 * 2 + 2 * 8 + 2 * 4,
    }
    assert adamw(1000, torch.bfloat16).work.bytes == 1000 * ((2 + 2 + 4 + 4 + 4) + (2 + 2 + 4 + 4))
    assert adamw(1000, torch.float32).work.bytes == 1000 * ((4 + 4 + 4 + 4) + (4 + 4 + 4))
    assert global_norm(1000, 8).work.bytes == 1000 * 4 + 4
    assert newton_schulz(2, 3, 4).work.bytes == 24 * 2 + 24 * 2


@pytest.mark.parametrize(
    ("cases", "leaves", "written"),
    [
        (rms_norm(6, 16), 96 * 2 + 16 * 2, 96 * 2),
        (swiglu(6, 16), 192 * 2, 96 * 2),
        (rope(2, 3, 2, 8), 96 * 2 + 2 * 12 * 4, 96 * 2),
        (attention(1, 2, 4, 6, 6), 3 * 48 * 2, 48 * 2 + 8 * 4),
    ],
    ids=["rms_norm", "swiglu", "rope", "attention"],
)
def test_a_backward_moves_more_than_its_forward(cases: list[Case], leaves: int, written: int) -> None:
    forward, backward = (case.work.bytes for case in cases)
    assert forward == leaves + written
    assert backward >= forward


@pytest.mark.parametrize("window", [None, 1, 3, 16, 40])
def test_pairs_are_those_of_the_mask(window: int | None) -> None:
    """Half the square for all positions, which leaves out half the diagonal; exactly the mask's for a window."""
    from nmoe.kernels.reference.attention import window_mask

    mask = window_mask(16, 16, window or 16, torch.device("cpu"))
    forward, backward = attention(2, 3, 16, 8, 4, window)
    pairs = 16 * 16 // 2 if window is None else int(mask.sum())
    if window is not None:
        assert visible_pairs(16, window) == pairs
    assert forward.work.flop == 2 * 2 * 3 * pairs * (8 + 4)
    assert backward.work.flop == 2 * 2 * 3 * pairs * (3 * 8 + 2 * 4)


@pytest.mark.parametrize(
    "case",
    [newton_schulz(3, 16, 24, steps=2), newton_schulz(3, 24, 16, steps=2), linear_cross_entropy(32, 16, 48, 8)[0]],
    ids=str,
)
def test_operations_are_those_of_the_products_that_run(case: Case, setting: Setting) -> None:
    """Counted by PyTorch while the reference runs: ours, and the peer that the rate is held against."""
    assert case.peer is not None
    for make in (case.make, case.peer.make):
        run = make(setting)
        with FlopCounterMode(display=False) as counter:
            run()
        assert counter.get_total_flops() == case.work.flop


CPU_CASES: list[Case] = [
    *rms_norm(6, 16),
    *rope(2, 3, 2, 8),
    *add_rms_norm(6, 16),
    *qkv_heads(2, 3, 2, 8),
    *mla_heads(2, 3, 2, 8, 4, 8),
    *swiglu(6, 16),
    *linear_cross_entropy(16, 8, 32, chunk=8),
    *route(12, 8, 2),
    *balance_loss(12, 8, 2, 3),
    *attention(1, 2, 16, 8, 8),
    *attention(1, 2, 16, 8, 8, 4),
    adamw(64, torch.bfloat16),
    adamw(64, torch.float32),
    global_norm(64, 4),
    newton_schulz(2, 8, 16),
]


@pytest.mark.parametrize("case", CPU_CASES, ids=str)
def test_cases_run_as_often_as_asked(case: Case, setting: Setting) -> None:
    """The ops' signatures are the table's; a backward may be run again, and gives finite numbers each time."""
    run = case.make(setting)
    for _ in range(2):
        written = [tensor for tensor in op_timing._tensors(run()) if tensor.is_floating_point()]
        assert all(tensor.isfinite().all() for tensor in written)
        if case.part == "backward":
            assert written, "a backward gives gradients"


@pytest.mark.parametrize("make", [rms_norm, linear_cross_entropy])
def test_a_step_writes_over_main_grad(make: Callable[..., list[Case]], setting: Setting) -> None:
    """As after an optimizer's step: what is timed adds to nothing."""
    given: list[torch.Tensor] = []

    class Watched(Setting):
        def weight(self, *sizes: int) -> torch.Tensor:
            given.append(super().weight(*sizes))
            return given[-1]

    case = make(6, 16)[1] if make is rms_norm else make(16, 8, 32, 8)[0]
    run = case.make(Watched(setting.ops, setting.device))
    run()
    (weight,) = given
    if make is rms_norm:  # the reference hands autograd the gain's gradient
        assert weight.main_grad_stale
        return
    first = weight.main_grad.clone()
    run()
    assert torch.equal(weight.main_grad, first)


def test_every_case_has_a_name_of_its_own_and_its_op() -> None:
    names = [str(case) for case in cases_of(OPS)]
    assert len(set(names)) == len(names)
    for name in CASES:
        assert {case.op for case in cases_of([name])} == {name}
    assert [case.op for case in cases_of(["swiglu", "rms_norm"])] == ["rms_norm"] * 6 + ["swiglu"] * 6


def test_the_shapes_that_bound_a_step_are_measured() -> None:
    bytes_of = {str(case): case.work.bytes for case in cases_of(OPS)}
    assert bytes_of["adamw step 1e9 bf16"] == 28 * 10**9
    assert bytes_of["adamw step 3e8 fp32"] == 28 * 3 * 10**8
    assert bytes_of["global_norm norm 8 of 250000000"] == 8 * 10**9 + 4
    assert bytes_of["linear_cross_entropy rows 2048x201088"] == 6 * 2048 * 201088 + 12 * 2048
    assert bytes_of["rms_norm forward 16384x512"] == 2 * (2 * 16_384 + 1) * 512
    assert bytes_of["rope forward 4x4096x1x64"] == 4 * 4 * 4096 * 64 + 2 * 4 * 4096 * 32


def test_bound_is_the_longer_one() -> None:
    assert RATES.bound_ms(Work(4 * 10**9)) == pytest.approx(1.0)
    assert RATES.bound_ms(Work(4 * 10**9, 1600 * 10**9)) == pytest.approx(2.0)
    assert RATES.bound_by(Work(4 * 10**9, 1600 * 10**9)) == "flop"
    assert RATES.bound_by(Work(4 * 10**9, 400 * 10**9)) == "bytes"


@pytest.mark.parametrize("work_bytes", [1, 10**6, 6 * 10**6, 50 << 20, 199 << 20, 201 << 20, 10**10])
def test_copies_exceed_the_l2_four_times(work_bytes: int) -> None:
    copies = copies_of(Work(work_bytes), L2)
    assert 1 <= copies <= op_timing.MOST_COPIES
    assert copies * work_bytes >= 4 * L2 or copies == op_timing.MOST_COPIES
    assert copies == 1 or (copies - 1) * work_bytes < 4 * L2, "no more of them than that takes"
    for bound_ms in (1e-4, 0.01, 0.5, 3.0, 60.0):
        repeats = repeats_of(copies, bound_ms)
        assert repeats % copies == 0
        assert copies <= repeats <= op_timing.MOST_REPEATS
        assert repeats * bound_ms >= op_timing.LEAST_GRAPH_MS or repeats > op_timing.MOST_REPEATS - copies


def test_bits_that_change_are_found(setting: Setting) -> None:
    count = iter(range(100))

    def make(setting: Setting, change_at: int) -> Run:
        x = torch.full((4,), torch.nan)

        def run() -> list[torch.Tensor | None]:
            return [None, x if next(count) % op_timing.BITS_RUNS != change_at else torch.zeros(4)]

        return run

    assert same_bits(partial(make, change_at=op_timing.BITS_RUNS), setting), "a NaN has its own bits"
    count = iter(range(100))
    assert not same_bits(partial(make, change_at=op_timing.BITS_RUNS - 1), setting)
    # Also where a run writes its result over the one before.
    buffer = torch.zeros(1, dtype=torch.bfloat16)
    assert not same_bits(lambda setting: lambda: buffer.add_(1), setting)


class FakeGraph:
    """As `captured`: two runs to warm up and one that is kept, whose replays take a millisecond a turn."""

    def __init__(self, run: Callable[[], Any]) -> None:
        for _ in range(3):
            self.kept = run()

    def __enter__(self) -> "FakeGraph":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def replay(self) -> None:
        pass


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times without a GPU: every graph takes 12 ms."""
    monkeypatch.setattr(op_timing, "captured", FakeGraph)
    monkeypatch.setattr(op_timing, "time_gpu", lambda run: Timing(12.0, 20))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)


@pytest.mark.usefixtures("fake_gpu")
def test_repeats_turn_over_the_copies(setting: Setting) -> None:
    """Each copy is made once, and comes again only after all others."""
    made: list[int] = []
    order: list[int] = []

    def make(setting: Setting) -> Run:
        copy = len(made)
        made.append(copy)
        return lambda: order.append(copy)

    assert op_timing.time_make(make, setting, copies=3, repeats=6).median_ms == 2.0
    assert made == [0, 1, 2]
    assert order == [0, 1, 2] * 6


@pytest.mark.usefixtures("fake_gpu")
def test_outputs_stay_as_long_as_copies(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """An output that is written over in the L2 would cost the memory nothing."""
    kept: list[Any] = []

    class Graph(FakeGraph):
        def __init__(self, run: Callable[[], Any]) -> None:
            super().__init__(run)
            kept.extend(self.kept)

    monkeypatch.setattr(op_timing, "captured", Graph)
    op_timing.time_make(lambda setting: lambda: torch.zeros(8), setting, copies=3, repeats=6)
    assert len({tensor.data_ptr() for tensor in kept}) == 3


@pytest.mark.usefixtures("fake_gpu")
def test_ours_and_the_peer_are_timed_alike(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """With as many copies and repeats; a peer that fails is told in its place."""
    asked: list[tuple[int, int]] = []

    def time_make(make: Any, setting: Setting, copies: int, repeats: int) -> Timing:
        asked.append((copies, repeats))
        make(setting)
        return Timing(0.5 * len(asked), 20)

    def none(setting: Setting) -> Run:
        raise KernelError("none")

    monkeypatch.setattr(ops, "time_make", time_make)
    bench = Bench(setting, L2, RATES)
    _, backward = attention(1, 2, 16, 8, 8)
    row = bench.measure(replace(backward, peer=Peer("plain", backward.make)))
    assert asked[0] == asked[1] == (row["copies"], row["repeats"])
    assert row["copies"] > 1
    assert row["ms"] == 0.5
    assert row["beside"]["ratio"] == 0.5
    assert row["equal_bits"] is row["beside"]["equal_bits"] is True
    row = bench.measure(replace(backward, peer=Peer("plain", none)))
    assert row["beside"] == {"name": "plain", "error": "KernelError: none"}
    with pytest.raises(KernelError, match="none"):
        bench.measure(replace(backward, make=none))


def test_a_compiled_backward_runs_again(setting: Setting) -> None:
    """Also where it was compiled as one that runs once, which PyTorch otherwise refuses to run again."""

    def make(setting: Setting) -> Run:
        x = setting.leaf(4, 4, dtype=torch.float32)
        compiled = torch.compile(lambda x: ((x @ x).sin() @ x).cos() @ x, backend="aot_eager", dynamic=False)
        compiled(x).sum().backward()
        return op_case.backward(compiled(x), (x,), torch.ones(4, 4))

    assert same_bits(op_attention._compiled_again(make), setting)


def case_of(op: str, make: Callable[[Setting], Run] = lambda setting: lambda: None, **changes: Any) -> Case:
    return replace(Case(op, "forward", "8", Work(4 * 10**9), make), **changes)


class FakeBench(Bench):
    """Gives times by the op's name; None: it fails."""

    times: dict[str, float | None]

    def __init__(self, **times: float | None) -> None:
        super().__init__(Setting(select_ops("reference", "cpu"), "cpu"), L2, RATES)
        object.__setattr__(self, "times", times)

    def measure(self, case: Case) -> dict[str, Any]:
        ms = self.times[case.op]
        if ms is None:
            raise torch.OutOfMemoryError("out of memory in /home/someone/x.py\nand more")
        row = op_report.make_row(case, ms, self.rates)
        if case.peer is not None:
            peer_ms = self.times[case.peer.name]
            told = {"error": "RuntimeError: none"} if peer_ms is None else op_report.make_beside(case, peer_ms, ms)
            row["beside"] = {"name": case.peer.name} | told
        return row

    def clocks(self) -> dict[str, Any]:
        return {"sm_mhz": "1980"}


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a machine with one, whose description is known: CUDA is not initialised."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(machine, "describe_gpu", lambda: {"gpu": "NVIDIA H200", "driver": "580.1"})
    monkeypatch.setattr(ops, "_versions", lambda: {"torch": "2.11"})
    was = torch.cuda.is_initialized()
    yield
    assert torch.cuda.is_initialized() == was


def run_ops(
    cases: list[Case], bench: FakeBench, monkeypatch: pytest.MonkeyPatch, *arguments: str, asked: Any = None
) -> int:
    """The command's exit code where there are these cases."""

    def given(names: Sequence[str]) -> list[Case]:
        assert asked is None or list(names) == asked
        return cases

    monkeypatch.setattr(ops, "print_ops", partial(ops.print_ops, start=lambda: bench, cases=given))
    return main(["ops", *arguments])


@pytest.mark.usefixtures("on_gpu")
def test_results_are_written_and_printed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "ops.json"
    cases = [
        case_of("rope"),
        case_of("attention", work=Work(10**6, 8 * 10**11), peer=Peer("cuDNN", lambda setting: lambda: None)),
    ]
    bench = FakeBench(rope=1.25, attention=2.0, cuDNN=1.6)
    arguments = ("--ops", "attention", "rope", "--output", str(file))
    assert run_ops(cases, bench, monkeypatch, *arguments, asked=["attention", "rope"]) == 0
    found = json.loads(file.read_text(encoding="utf-8"))
    assert list(found) == ["date", "command", "machine", "versions", "note", "clocks", "rates", "rows"]
    assert found["command"] == "python -m nmoe.kernels.bench ops --ops attention rope --output ops.json"
    assert found["rates"] == {"copy_tb_s": 4.0, "matmul_tflops": 800.0}
    moved, computed = found["rows"]
    assert moved == {
        "op": "rope",
        "part": "forward",
        "shape": "8",
        "ms": 1.25,
        "bytes": 4 * 10**9,
        "flop": 0,
        "bound_ms": 1.0,
        "bound_by": "bytes",
        "share": 0.8,
    }
    assert computed["bound_by"] == "flop"
    assert computed["share"] == 0.5
    assert computed["tflops"] == 400.0
    assert computed["share_of_788_tflops"] == round(400 / 788, 3)
    assert computed["beside"] == {"name": "cuDNN", "ms": 1.6, "ratio": 1.25, "tflops": 500.0}
    told = capsys.readouterr().out
    assert main(["table", str(file)]) == 0
    table = capsys.readouterr().out
    assert told.endswith(table)
    lines = table.splitlines()
    assert "3.20 TB/s | 1 (bytes) | 80% | – | – | – |" in lines[2]
    assert "400 TFLOP/s | 1 (flop) | 50% | cuDNN: 1.6 ms | 1.25 | – |" in lines[3]
    assert len({line.count("|") for line in lines[:4]}) == 1
    assert "4.0 TB/s of a copy" in table


@pytest.mark.usefixtures("on_gpu")
def test_one_failure_hides_no_other_op(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "ops.json"
    cases = [case_of("rope"), case_of("swiglu"), case_of("route")]
    assert run_ops(cases, FakeBench(rope=1.0, swiglu=None, route=1.0), monkeypatch, "--output", str(file)) == 1
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    assert [row["op"] for row in rows] == ["rope", "swiglu", "route"]
    error = "OutOfMemoryError: out of memory in x.py"
    assert rows[1] == {"op": "swiglu", "part": "forward", "shape": "8", "error": error}
    printed = capsys.readouterr()
    assert f"error: swiglu forward 8 not measured: {error}" in printed.err
    assert "| swiglu | forward | 8 | not measured [1] |" in printed.out
    assert f"[1] {error}" in printed.out


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize(
    ("ours", "products", "code"), [(1.15, 1.0, 0), (1.16, 1.0, 1), (1.0, None, 1), (1.0, float("nan"), 1)]
)
def test_a_ratio_that_is_not_kept_fails_the_command(
    ours: float,
    products: float | None,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Also where what it is held against failed."""
    case = case_of("rope", peer=Peer("products", lambda setting: lambda: None), most_of_peer=1.15)
    assert run_ops([case], FakeBench(rope=ours, products=products), monkeypatch) == code
    assert ("expected at most 1.15 times products" in capsys.readouterr().err) == bool(code)


@pytest.mark.usefixtures("on_gpu")
def test_a_peer_that_fails_is_a_note(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    case = case_of("rope", peer=Peer("FlexAttention", lambda setting: lambda: None))
    assert run_ops([case], FakeBench(rope=1.0, FlexAttention=None), monkeypatch) == 0
    assert "FlexAttention: not measured [1]" in capsys.readouterr().out


def test_bits_of_both_are_in_the_table() -> None:
    row = op_report.make_row(case_of("rope"), 1.0, RATES) | {"equal_bits": True}
    row["beside"] = {"name": "cuDNN", "ms": 1.0, "ratio": 1.0, "equal_bits": False}
    assert op_report.text_line(row).endswith("yes / no")


@pytest.mark.parametrize("content", ['{"rates": {}, "rows": []}', '{"rates": 1, "rows": [{}]}'])
def test_table_refuses_other_files(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "other.json"
    file.write_text(content, encoding="utf-8")
    assert main(["table", str(file)]) == 1
    assert "expected results of moe-layer or of ops" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--ops"], ["--ops", "softmax"], ["--op", "rope"], ["rope"]])
def test_wrong_arguments(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["ops", *arguments])
    assert ended.value.code == 2


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["ops"]) == 1
    assert "expected a CUDA GPU, found none" in capsys.readouterr().err


def test_help_names_every_op(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["ops", "--help"])
    assert ended.value.code == 0
    told = " ".join(capsys.readouterr().out.split())
    assert all(name in told for name in OPS)
    assert "--output FILE" in told


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_small_cases_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Forward, backward, a peer, bits, and an op that fails among them: times lie above their bounds."""

    def fails(setting: Setting) -> Run:
        raise KernelError("none")

    before = torch.cuda.memory_allocated()
    file = tmp_path / "ops.json"
    cases = [*rms_norm(65_536, 768), case_of("rope", fails), *attention(2, 4, 1024, 64, 64)]
    monkeypatch.setattr(ops, "print_ops", partial(ops.print_ops, cases=lambda names: cases))
    assert main(["ops", "--output", str(file)]) == 1
    printed = capsys.readouterr()
    assert printed.err.count("error:") == 1, printed.err
    found = json.loads(file.read_text(encoding="utf-8"))
    assert found["rates"]["copy_tb_s"] > 0.5
    assert found["rates"]["matmul_tflops"] > 50
    assert found["rows"].pop(2)["error"] == "KernelError: none"
    for row in found["rows"]:
        assert 0 < row["share"] < 1.1, row
        assert row["repeats"] % row["copies"] == 0
    for row in found["rows"][2:]:
        assert row["beside"].get("ms", 0) > 0, row
    assert isinstance(found["rows"][3]["equal_bits"], bool)
    assert isinstance(found["rows"][3]["beside"]["equal_bits"], bool)
    # cuBLAS keeps a workspace for each stream.
    assert torch.cuda.memory_allocated() < before + (2 << 30), "what a case held is given back"
