"""The bench: its arithmetic, its report, the routing it asks for, and that a failing process is told, not hidden."""

import json
import sys
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from nmoe.kernels.bench import accuracy, cold, equal_bits, machine, moe_layer, tiles
from nmoe.kernels.bench.__main__ import main
from nmoe.kernels.bench.accuracy import Distances
from nmoe.kernels.bench.equal_bits import count_hashes, differences
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
H200 = {"machine": {"gpu": "NVIDIA H200", "driver": "580.1"}, "versions": {"torch": "2.11"}}


def result(ms: float, **changes: Any) -> dict[str, Any]:
    """What a worker gives."""
    return (
        {
            "layer": "nmoe",
            "weight_grad": "fp32",
            "rows_max_over_mean": 1.25,
            "memory_bytes": 1 << 30,
            "first_s": 2.5,
            "times": {name: {"ms": ms * n, "runs": 20} for name, n in (("forward_graph", 1), ("both_graph", 3))}
            | {"both_eager": {"ms": ms * 4, "runs": 20}},
            "not_measured": {},
            "clocks": {"before": {"sm_mhz": "345"}, "under_load": {"sm_mhz": "1980"}},
        }
        | H200
        | changes
    )


def read_results(file: Path, *measured: str) -> dict[str, Any]:
    """What a command wrote: what every command writes and the `measured` keys, no others (a host's), and no folder."""
    text = file.read_text(encoding="utf-8")
    assert str(file.parent) not in text
    found = json.loads(text)
    assert list(found) == ["date", "command", "machine", "versions", *measured]
    assert found["command"].startswith("python -m nmoe.kernels.bench ")
    assert f"--output {file.name}" in found["command"]
    return found


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a machine with one, whose description is known: CUDA is not initialised."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machine, "describe_gpu", lambda: H200["machine"])
    was = torch.cuda.is_initialized()
    yield
    assert torch.cuda.is_initialized() == was


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
    assert results["machine"] == H200["machine"]
    assert results["versions"] == {"nmoe": H200["versions"], "torch": H200["versions"]}
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


SAME = {"uniform": {"out": "aa", "dx": "bb"}}
OTHER = {"uniform": {"out": "aa", "dx": "cc"}}
LESS = {"uniform": {"out": "aa"}}


def test_differing_bits_are_found() -> None:
    assert differences([SAME, SAME, SAME]) == []
    assert differences([SAME, SAME, OTHER]) == ["uniform/dx of process 3: cc, of process 1: bb"]
    assert differences([SAME, LESS]) == ["uniform/dx of process 2: none, of process 1: bb"]
    assert count_hashes([SAME, OTHER, SAME]) == {"uniform/out": {"aa": 3}, "uniform/dx": {"bb": 2, "cc": 1}}
    assert count_hashes([LESS, SAME])["uniform/dx"] == {"none": 1, "bb": 1}


def equal_bits_of(given: list[Mapping[str, Any]], file: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """The command's exit code where the processes give these."""
    gives = iter(given)

    def run(arguments: list[str], timeout_s: float) -> Mapping[str, Any]:
        assert arguments == ["--task", "bits", "--shape", str(SMALL), "--routing", "uniform"]
        return next(gives)

    monkeypatch.setattr(equal_bits, "print_equal_bits", partial(equal_bits.print_equal_bits, run=run))
    options = ["--shape", str(SMALL), "--routing", "uniform", "--processes", str(len(given)), "--output", str(file)]
    return main(["equal-bits", *options])


@pytest.mark.parametrize(("last", "code", "counts"), [(SAME, 0, {"bb": 3}), (OTHER, 1, {"bb": 2, "cc": 1})])
def test_equal_bits_writes_what_each_process_gave(
    last: Any, code: int, counts: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where bits differ: the file then says so."""
    file = tmp_path / "bits.json"
    assert equal_bits_of([{"hashes": hashes} | H200 for hashes in (SAME, SAME, last)], file, monkeypatch) == code
    found = read_results(file, "shape", "processes", "same_bits", "processes_by_sha256")
    assert {key: found[key] for key in H200} == H200
    assert found["shape"] == str(SMALL)
    assert found["processes"] == 3
    assert found["same_bits"] == (code == 0)
    assert found["processes_by_sha256"] == {"uniform/out": {"aa": 3}, "uniform/dx": counts}


def test_a_process_that_fails_is_no_agreement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "bits.json"
    assert equal_bits_of([{"hashes": SAME} | H200, {"error": "signal 11"}], file, monkeypatch) == 1
    assert "process 2 of 2 failed: signal 11" in capsys.readouterr().out
    assert not file.exists()


def cold_of(given: dict[str, Any], file: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """The command's exit code where the process compiles two kernels and gives this."""

    def run(arguments: list[str], timeout_s: float, environment: Mapping[str, str]) -> dict[str, Any]:
        assert arguments == ["--task", "cold", "--shape", str(SMALL)]
        for name, variable in (("a.cubin", "NMOE_KERNEL_CACHE"), ("b.cubin", "TRITON_CACHE_DIR")):
            folder = Path(environment[variable])
            assert not folder.exists(), "the cache is empty"
            folder.mkdir(parents=True)
            (folder / name).touch()
        return given

    monkeypatch.setattr(cold, "print_cold", partial(cold.print_cold, run=run))
    return main(["cold", "--shape", str(SMALL), "--output", str(file)])


@pytest.mark.usefixtures("on_gpu")
def test_cold_writes_its_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "cold.json"
    assert cold_of({"layer": "nmoe", "forward_s": 1.25, "both_s": 1.875} | H200, file, monkeypatch) == 0
    found = read_results(file, "shape", "kernels_compiled", "forward_s", "both_s", "process_s")
    assert found.pop("process_s") >= 0
    measured = {"shape": str(SMALL), "kernels_compiled": 2, "forward_s": 1.25, "both_s": 1.875}
    assert {key: found[key] for key in found if key not in ("date", "command")} == H200 | measured
    assert "first forward 1.25 s" in capsys.readouterr().out


@pytest.mark.usefixtures("on_gpu")
def test_a_cold_process_that_fails_fails_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "cold.json"
    assert cold_of({"error": "signal 11"}, file, monkeypatch) == 1
    assert "found signal 11" in capsys.readouterr().err
    assert not file.exists()


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize(("dx", "code"), [(3e-3, 0), (4e-3, 0), (4.1e-3, 1), (float("nan"), 1)])
def test_accuracy_fails_where_ours_is_farther(
    dx: float, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In any tensor; as far as PyTorch is near enough."""
    pytest.importorskip("cuda.bindings", reason="the CUDA kernels are for Linux")
    distances = {"out": Distances(1e-3, 4e-3), "dx": Distances(dx, 4e-3), "dw2": Distances(2e-3, 4e-3)}
    measured = partial(accuracy.print_accuracy, measure=lambda: distances)
    monkeypatch.setattr(accuracy, "print_accuracy", measured)
    file = tmp_path / "accuracy.json"
    assert main(["accuracy", "--output", str(file)]) == code
    found = read_results(file, "note", "shape", "at_most_torch", "distances")
    assert found["machine"] == H200["machine"]
    assert found["versions"]["torch"] in torch.__version__
    assert found["shape"] == "2048,512,256,16,4"
    assert found["at_most_torch"] == (code == 0)
    assert found["distances"]["out"] == {"ours": 1e-3, "torch": 4e-3, "ratio": 0.25}
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert list(rows) == ["tensor", *distances]
    assert [name for name, line in rows.items() if "above torch" in line] == ["dx"] * code
    assert "0.250" in rows["out"]


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


def test_worker_tells_what_its_bits_are_of(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["worker", "--task", "bits", "--shape", str(SMALL), "--routing", "uniform,zipf"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["hashes"]) == {"uniform", "zipf"}
    assert found["machine"] == {}
    assert found["versions"]["torch"] in torch.__version__


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
        ["cold", "--out", "a/cold.json"],
        ["accuracy", "--shape", "moonlet"],
        ["table"],
        ["worker"],
    ],
)
def test_wrong_arguments(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2


@pytest.mark.parametrize("command", [["moe-layer", "--shapes", "moonlet"], ["tiles"], ["cold"], ["accuracy"]])
def test_without_a_gpu(command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(command) == 1
    assert "expected a CUDA GPU, found none" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["moe-layer", "cold", "equal-bits", "accuracy"])
def test_help_names_what_is_written(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert command in capsys.readouterr().out.split()
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert "--output FILE" in capsys.readouterr().out


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
@pytest.mark.usefixtures("gpu")
def test_moe_layer_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "results.json"
    shape = "2048,256,128,16,4"
    code = main(["moe-layer", "--shapes", shape, "--peers", "torch", "--rounds", "1", "--output", str(file)])
    assert code == 0, capsys.readouterr()
    rows = read_results(file, "clocks", "note", "rounds", "rows")["rows"]
    assert [row["layer"] for row in rows] == ["nmoe", "torch"]
    for row in rows:
        for measure in ("forward_graph", "both_graph", "both_eager"):
            assert row[measure].get("tflops", 0) > 0, row


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_cold_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "cold.json"
    assert main(["cold", "--shape", "2048,256,128,16,4", "--output", str(file)]) == 0, capsys.readouterr()
    found = read_results(file, "shape", "kernels_compiled", "forward_s", "both_s", "process_s")
    assert found["machine"]["gpu"] == torch.cuda.get_device_name()
    assert found["kernels_compiled"] > 0
    assert 0 < found["forward_s"] < found["both_s"] < found["process_s"]


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_equal_bits_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bits.json"
    options = ["--shape", "2048,256,128,16,4", "--processes", "2", "--output", str(file)]
    assert main(["equal-bits", *options]) == 0, capsys.readouterr()
    found = read_results(file, "shape", "processes", "same_bits", "processes_by_sha256")
    assert found["machine"]["gpu"] == torch.cuda.get_device_name()
    assert "nvrtc" in found["versions"]
    names = {f"{routing}/{name}" for routing in ("uniform", "zipf") for name in ("out", "dx", "drouter", "dw13", "dw2")}
    assert set(found["processes_by_sha256"]) == names
    assert all(list(counts.values()) == [2] for counts in found["processes_by_sha256"].values())
