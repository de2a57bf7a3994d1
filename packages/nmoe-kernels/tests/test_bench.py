"""The bench: its arithmetic, its report, the routing it asks for, and that a failing process is told, not hidden."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from nmoe.kernels.bench import moe_layer, tiles
from nmoe.kernels.bench.__main__ import main
from nmoe.kernels.bench.equal_bits import differences, print_equal_bits
from nmoe.kernels.bench.machine import command_line, without_folders
from nmoe.kernels.bench.peers import NmoeLayer, TorchLayer
from nmoe.kernels.bench.problem import (
    DEFAULT_SHAPES,
    ROUTING_KINDS,
    RoutingKind,
    Shape,
    check_rows,
    make_problem,
    parse_shape,
)
from nmoe.kernels.bench.processes import run_command, sonic_environment
from nmoe.kernels.bench.report import markdown, summarise, tflops
from nmoe.kernels.bench.timing import LEAST, MOST, runs_in_budget
from nmoe.kernels.bench.worker import hash_step, hash_tensor
from nmoe.kernels.errors import KernelError, ShapeError

SMALL = Shape(512, 64, 32, 16, 4)
PUBLISHED = Shape(40960, 768, 256, 128, 8)


def result(ms: float, **changes: Any) -> dict[str, Any]:
    """What a worker gives."""
    return {
        "layer": "nmoe",
        "weight_grad": "fp32",
        "rows_max_over_mean": 1.25,
        "memory_bytes": 1 << 30,
        "first_s": 2.5,
        "times": {name: {"ms": ms * n, "runs": 20} for name, n in (("forward_graph", 1), ("both_graph", 3))}
        | {"both_eager": {"ms": ms * 4, "runs": 20}},
        "not_measured": {},
        "clocks": {"before": {"sm_mhz": "345"}, "under_load": {"sm_mhz": "1980"}},
        "machine": {"gpu": "NVIDIA H200", "driver": "580.1"},
        "versions": {"torch": "2.11"},
    } | changes


@pytest.mark.parametrize("text", ["1,2,3", "1,2,3,4,5,6", "a,b,c,d,e", "8,8,8,2,3", "0,8,8,2,1", "moonlit", ""])
def test_shapes_are_checked(text: str) -> None:
    with pytest.raises(ShapeError, match="expected a shape"):
        parse_shape(text)


def test_shapes_have_names() -> None:
    assert parse_shape("moonlet") == parse_shape("32768,2048,1408,64,6")
    assert all(parse_shape(str(shape)) == shape for shape in DEFAULT_SHAPES)


def test_operations_are_those_of_three_products() -> None:
    """Counted from the matrices: gate, up and down, each R rows; the backward twice that."""
    rows = SMALL.tokens * SMALL.top_k
    products = [(rows, SMALL.width, SMALL.hidden)] * 2 + [(rows, SMALL.hidden, SMALL.width)]
    assert SMALL.forward_flop == sum(2 * m * k * n for m, k, n in products)
    assert SMALL.both_flop == 3 * SMALL.forward_flop
    assert tflops(1e12, 1000.0) == 1.0
    by_product = [tiles.product_flop(name, SMALL) for name in ("up", "down")]
    assert sum(by_product) == SMALL.forward_flop
    backward = ("dgrad_activation", "dgrad_input", "wgrad_down", "wgrad_up")
    assert sum(tiles.product_flop(name, SMALL) for name in backward) == SMALL.both_flop - SMALL.forward_flop


def test_runs_fit_the_budget() -> None:
    assert runs_in_budget(2.0) == 75
    assert runs_in_budget(1000.0) == LEAST
    assert runs_in_budget(0.0) == MOST


def test_row_is_the_median_over_rounds() -> None:
    row = summarise(SMALL, "uniform", "nmoe", [result(2.0), result(1.0), result(1.1)])
    assert row["forward_graph"]["ms"] == 1.1
    assert row["forward_graph"]["spread"] == 1.0
    assert row["both_graph"]["tflops"] == pytest.approx(SMALL.both_flop / 3.3e-3 / 1e12, abs=0.06)
    assert row["both_eager"]["rounds_ms"] == [8.0, 4.0, 4.4]
    assert row["rounds"] == 3


def test_failures_are_rows_with_their_reason() -> None:
    whole = summarise(SMALL, "uniform", "sonic", [{"error": "ImportError: none"}])
    assert whole["both_graph"] == {"not_measured": "ImportError: none"}
    times = result(1.0)["times"]
    del times["both_graph"]
    part = result(1.0, times=times, not_measured={"both_graph": "cannot be captured"})
    row = summarise(SMALL, "uniform", "sonic", [part, {"error": "signal 9"}])
    assert row["both_graph"] == {"not_measured": "cannot be captured"}
    assert row["forward_graph"]["ms"] == 1.0
    assert row["failed_rounds"] == ["signal 9"]


@pytest.mark.parametrize(("part", "void"), [(0.8, True), (0.95, False)])
def test_a_peer_far_below_its_published_figure_is_void(part: float, void: bool) -> None:
    ms = PUBLISHED.forward_flop / (341e12 * part) * 1e3
    row = summarise(PUBLISHED, "uniform", "sonic", [result(ms)])
    assert ("void" in row) == void
    assert "void" not in summarise(PUBLISHED, "uniform", "nmoe", [result(ms)])
    assert "void" not in summarise(PUBLISHED, "zipf", "sonic", [result(ms)])


def test_layers_take_turns_and_results_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Round by round, a layer that failed at first is not run again, and the file gives the same Markdown."""
    order: list[str] = []

    def run(layer: str, shape: Shape, routing: RoutingKind) -> dict[str, Any]:
        order.append(layer)
        return {"error": "ImportError: no module"} if layer == "sonic" else result(float(len(order)), layer=layer)

    file = tmp_path / "results.json"
    layers = ("nmoe", "torch", "sonic")
    results = moe_layer.compare([SMALL], layers, ["uniform"], 3, run=run, command="command", output=file)
    assert order == ["nmoe", "torch", "sonic", "nmoe", "torch", "nmoe", "torch"]
    assert moe_layer.failed(results) == []
    stored = json.loads(file.read_text(encoding="utf-8"))
    assert stored == results
    assert {"date", "command", "machine", "versions", "clocks", "note", "rounds", "rows"} == set(stored)
    assert "fp32" in stored["note"]
    assert stored["clocks"] == {"before": {"sm_mhz": "345"}, "after": {"sm_mhz": "1980"}}
    capsys.readouterr()
    assert main(["table", str(file)]) == 0
    assert capsys.readouterr().out == markdown([results]) + "\n"


def test_our_own_failure_fails_the_command() -> None:
    rows = [summarise(SMALL, "uniform", name, [{"error": "broken"}]) for name in ("torch", "nmoe")]
    told = moe_layer.failed({"rows": rows})
    assert len(told) == 3
    assert all("broken" in line for line in told)


def test_markdown_has_each_figure_and_each_reason() -> None:
    rows = [
        summarise(SMALL, "uniform", "nmoe", [result(0.004)]),
        summarise(SMALL, "uniform", "sonic", [{"error": "ImportError: none"}]),
    ]
    common = {"machine": {"gpu": "NVIDIA H200", "driver": "580.1"}, "versions": {"nmoe": {"torch": "2.11"}}}
    text = markdown([{"rows": rows, "date": "2026-11-20", "note": "As noted.", **common}])
    lines = text.splitlines()
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1
    assert f"{SMALL.forward_flop / 4e-6 / 1e12:.0f} (0.00)" in lines[2]
    assert lines[3].count("not measured [1]") == 3
    assert "[1] not measured: ImportError: none" in lines
    assert "NVIDIA H200" in text
    assert "As noted." in text


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"rows": [{}]}'])
def test_table_refuses_other_files(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "other.json"
    file.write_text(content, encoding="utf-8")
    assert main(["table", str(file)]) == 1
    assert "expected results of moe-layer" in capsys.readouterr().err


@pytest.mark.parametrize("routing", ROUTING_KINDS)
@pytest.mark.parametrize("make", [NmoeLayer, TorchLayer])
def test_layers_route_as_asked(routing: RoutingKind, make: Any) -> None:
    """The same prior, the same counts, whether scores are sigmoids or a softmax, fp32 or bf16."""
    problem = make_problem(SMALL, routing, "cpu")
    counts = make(problem).rows_per_expert(problem.x_TD)
    assert check_rows(counts, SMALL, routing) >= 1
    for other in set(ROUTING_KINDS) - {routing}:
        if {routing, other} != {"zipf", "one"}:
            with pytest.raises(KernelError, match=f"expected '{other}' routing"):
                check_rows(counts, SMALL, other)


def test_zipf_is_not_one() -> None:
    problem = make_problem(SMALL, "zipf", "cpu")
    counts = NmoeLayer(problem).rows_per_expert(problem.x_TD)
    with pytest.raises(KernelError, match="expected 'one' routing"):
        check_rows(counts, SMALL, "one")


def test_lost_rows_are_found() -> None:
    with pytest.raises(KernelError, match="expected 2048 rows"):
        check_rows([128] * 15 + [127], SMALL, "uniform")


def test_problems_are_the_same_for_the_same_seed() -> None:
    one, two, other = (make_problem(SMALL, "zipf", "cpu", seed) for seed in (0, 0, 1))
    assert hash_tensor(one.w13_e2FD) == hash_tensor(two.w13_e2FD)
    assert hash_tensor(one.w13_e2FD) != hash_tensor(other.w13_e2FD)


def test_gradients_are_all_there_and_overwritten() -> None:
    """Two steps give the same bits: what the first left in the weight gradients is not added to."""
    problem = make_problem(SMALL, "uniform", "cpu")
    layer = NmoeLayer(problem)
    first = hash_step(layer, problem)
    assert set(first) == {"out", "dx", "drouter", "dw13", "dw2"}
    assert hash_step(layer, problem) == first


def test_one_bit_changes_the_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nmoe.kernels.bench.worker._HASH_BYTES", 64)
    tensor = torch.randn(10, 10).bfloat16()
    changed = tensor.clone()
    changed.view(torch.int16)[9, 9] ^= 1
    assert hash_tensor(tensor) == hash_tensor(tensor.clone())
    assert hash_tensor(tensor) != hash_tensor(changed)
    assert hash_tensor(tensor) != hash_tensor(tensor.view(20, 5))


def test_differing_bits_are_found(capsys: pytest.CaptureFixture[str]) -> None:
    same = {"uniform": {"out": "aa", "dx": "bb"}}
    other = {"uniform": {"out": "aa", "dx": "cc"}}
    assert differences([same, same, same]) == []
    assert differences([same, same, other]) == ["uniform dx of process 3: cc, of process 1: bb"]
    assert differences([same, {"uniform": {"out": "aa"}}]) != []
    gives = iter([same, other, same, same, same, {"error": "signal 11"}])

    def run(arguments: list[str], timeout_s: float) -> dict[str, Any]:
        found = next(gives)
        return found if "error" in found else {"hashes": found}

    assert not print_equal_bits(SMALL, ["uniform"], 2, 1.0, run=run)
    assert print_equal_bits(SMALL, ["uniform"], 2, 1.0, run=run)
    assert not print_equal_bits(SMALL, ["uniform"], 2, 1.0, run=run), "a process that fails is no agreement"
    assert "signal 11" in capsys.readouterr().out


def test_processes_that_fail_are_told() -> None:
    """Whatever a process does, there is a result: its JSON line, or one with the reason."""

    def run(code: str, timeout_s: float = 60.0) -> dict[str, Any]:
        return run_command([sys.executable, "-c", code], timeout_s=timeout_s)

    assert run("print('noise'); print('{\"times\": 1}')") == {"times": 1}
    assert run('print(\'{"error": "told"}\'); raise SystemExit(1)') == {"error": "told"}
    assert "exit code 3" in run("print('{\"times\": 1}'); raise SystemExit(3)")["error"]
    assert "ValueError: bad" in run("raise ValueError('bad')")["error"]
    assert "signal 9" in run("import os; os.kill(os.getpid(), 9)")["error"]
    assert "longer than 0.2 s" in run("import time; time.sleep(30)", 0.2)["error"]


def test_what_a_process_started_ends_with_it() -> None:
    """A grandchild keeps the pipes open, for longer than this test may take."""
    code = "import subprocess; subprocess.run(['sleep', '300'])"
    start = time.monotonic()
    assert "longer than" in run_command([sys.executable, "-c", code], timeout_s=1.0)["error"]
    assert time.monotonic() - start < 30


def test_worker_gives_its_error_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["worker", "--task", "bits", "--shape", "64,32,16,8,2", "--layer", "sonic"]) == 1
    assert "sonicmoe" in json.loads(capsys.readouterr().out)["error"]


def test_peer_path_is_for_sonic_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "before")
    (tmp_path / "nvidia_cutlass_dsl" / "python_packages").mkdir(parents=True)
    folders = sonic_environment(str(tmp_path))["PYTHONPATH"].split(":")
    assert folders == [str(tmp_path), str(tmp_path / "nvidia_cutlass_dsl" / "python_packages"), "before"]
    assert "PYTHONPATH" not in sonic_environment(None)
    environments: dict[str, Any] = {}

    def run_process(arguments: list[str], timeout_s: float, environment: Any) -> dict[str, Any]:
        environments[arguments[arguments.index("--layer") + 1]] = environment
        return {}

    monkeypatch.setattr(moe_layer, "run_process", run_process)
    for layer in ("nmoe", "torch", "sonic"):
        moe_layer.process_runner(str(tmp_path), 1.0)(layer, SMALL, "uniform")
    assert environments["nmoe"] is environments["torch"] is None
    assert environments["sonic"]["QUACK_CACHE_AUTOTUNING"] == "1"


def test_results_name_no_folder() -> None:
    typed = ["moe-layer", "--peer-path", "/home/someone/site", "--output=/srv/x/out.json", "--rounds", "2"]
    command = "python -m nmoe.kernels.bench moe-layer --peer-path site --output=out.json --rounds 2"
    assert command_line(typed) == command
    assert without_folders("no file '/home/someone/a b' at 3/4 of 10 TFLOP/s") == "no file 'a b' at 3/4 of 10 TFLOP/s"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["moe-layer", "--shapes", "1,2,3"],
        ["moe-layer", "--peers", "liger"],
        ["moe-layer", "--peers", "torch,torch"],
        ["moe-layer", "--routing", "skewed"],
        ["moe-layer", "--rounds", "0"],
        ["equal-bits", "--processes", "1"],
        ["cold", "--shape", "moonlit"],
        ["table"],
        ["worker"],
    ],
)
def test_wrong_arguments(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2


@pytest.mark.parametrize("command", [["moe-layer", "--shapes", "moonlet"], ["tiles"], ["cold"]])
def test_without_a_gpu(command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(command) == 1
    assert "expected a CUDA GPU, found none" in capsys.readouterr().err


def test_missing_peer_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["moe-layer", "--peer-path", str(tmp_path / "none")]) == 1
    assert "expected a folder of packages" in capsys.readouterr().err


def test_table_lines_are_only_where_the_choice_would_be_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the table already has a line: the choice without it counts."""
    from nmoe.kernels.native.tiles import CANDIDATES, TABLE, choose_tile

    shape = parse_shape("moonlet")
    product = next(name for name, candidates in CANDIDATES.items() if len(candidates) > 1)
    key = (product, shape.width, shape.hidden)
    monkeypatch.delitem(TABLE, key, raising=False)
    chosen = choose_tile(*key)
    other = next(tile for tile in CANDIDATES[product] if tile != chosen)
    slower = {product: {chosen: 1.0, other: 0.9}}
    (line,) = tiles.table_lines(shape, slower)
    assert line.strip().startswith(f'("{product}", {shape.width}, {shape.hidden}): Tile({other.m}, {other.n}),')
    assert list(tiles.table_lines(shape, {product: {chosen: 1.0, other: 0.999}})) == []
    assert list(tiles.table_lines(shape, {product: {chosen: 1.0, other: 1.1}})) == []
    monkeypatch.setitem(TABLE, key, other)
    assert list(tiles.table_lines(shape, slower)) == [line]
    assert TABLE[key] == other


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, found none")
def test_moe_layer_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from nmoe.kernels.arch import NATIVE_ARCHES, detect_arch

    if detect_arch() not in NATIVE_ARCHES:
        pytest.skip(f"needs one of {', '.join(NATIVE_ARCHES)}, found {detect_arch()}")
    file = tmp_path / "results.json"
    shape = "2048,256,128,16,4"
    code = main(["moe-layer", "--shapes", shape, "--peers", "torch", "--rounds", "1", "--output", str(file)])
    assert code == 0, capsys.readouterr()
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    assert [row["layer"] for row in rows] == ["nmoe", "torch"]
    for row in rows:
        for measure in ("forward_graph", "both_graph", "both_eager"):
            assert row[measure].get("tflops", 0) > 0, row
