"""One layer of one shape in a process of its own: prints one JSON line.

Tasks: `time` measures, `cold` times the first forward and backward, `bits` hashes what a forward and backward give.
"""

import hashlib
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from nmoe.kernels.bench import machine
from nmoe.kernels.bench.peers import LAYERS, Layer
from nmoe.kernels.bench.problem import Problem, RoutingKind, Shape, check_rows, make_problem
from nmoe.kernels.bench.timing import captured, time_gpu

MEASURES = ("forward_graph", "both_eager", "both_graph")
TENSORS = ("out", "dx", "drouter", "dw13", "dw2")
_HASH_BYTES = 64 << 20
_LOAD_MS = 400.0


def run_worker(task: str, layer: str, shape: Shape, routings: list[RoutingKind]) -> int:
    """Prints the result, or what went wrong, as the last line; gives the exit code."""
    tasks: dict[str, Callable[[str, Shape, list[RoutingKind]], dict[str, Any]]] = {
        "time": _time,
        "cold": _cold,
        "bits": _bits,
    }
    try:
        result = tasks[task](layer, shape, routings)
    except Exception as error:  # a peer may raise anything: it is told, not raised
        import traceback

        traceback.print_exc()
        result = {"error": describe_error(error)}
    print(json.dumps(result), flush=True)
    return 1 if "error" in result else 0


def describe_error(error: BaseException) -> str:
    """One line without folders."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return machine.without_folders(f"{type(error).__name__}: {lines[0] if lines else ''}")[:300]


def _time(name: str, shape: Shape, routings: list[RoutingKind]) -> dict[str, Any]:
    problem = make_problem(shape, routings[0], "cuda")
    before = machine.clocks()
    layer = LAYERS[name](problem)
    x_TD = problem.x_TD.requires_grad_()

    def forward() -> torch.Tensor:
        return layer.forward(x_TD)

    def both() -> list[torch.Tensor]:
        return layer.gradients(x_TD, layer.forward(x_TD), problem.dy_TD)

    start = time.perf_counter()
    for _ in range(2):  # the first compiles and tunes
        both()
    torch.cuda.synchronize()
    first_s = time.perf_counter() - start
    counts = layer.rows_per_expert(x_TD)
    ratio = check_rows(counts, shape, routings[0])

    torch.cuda.reset_peak_memory_stats()
    result: dict[str, Any] = {
        "layer": name,
        "weight_grad": layer.weight_grad,
        "rows_max_over_mean": round(ratio, 3),
        "first_s": round(first_s, 2),
        "times": {"both_eager": _timed(both)},
        "not_measured": {},
        "memory_bytes": torch.cuda.max_memory_allocated(),
    }
    for measure, run in (("forward_graph", forward), ("both_graph", both)):
        try:
            result["times"][measure] = _timed_captured(run)
        except Exception as error:  # whatever a layer raises where it cannot be captured
            result["not_measured"][measure] = describe_error(error)
    result["clocks"] = {"before": before, "under_load": _clocks_under_load(both, result["times"]["both_eager"])}
    result["machine"] = machine.describe_gpu()
    result["versions"] = layer.versions()
    return result


def _timed(run: Callable[[], Any]) -> dict[str, float]:
    timing = time_gpu(run)
    return {"ms": timing.median_ms, "runs": timing.runs}


def _timed_captured(run: Callable[[], Any]) -> dict[str, float]:
    with captured(run) as graph:
        return _timed(graph.replay)


def _clocks_under_load(run: Callable[[], Any], timing: dict[str, float]) -> dict[str, Any]:
    for _ in range(int(_LOAD_MS / timing["ms"]) + 1):
        run()
    found = machine.clocks()  # while the GPU works off the queue
    torch.cuda.synchronize()
    return found


def _cold(name: str, shape: Shape, routings: list[RoutingKind]) -> dict[str, Any]:
    problem = make_problem(shape, routings[0], "cuda")
    torch.cuda.synchronize()
    start = time.perf_counter()
    layer = LAYERS[name](problem)
    x_TD = problem.x_TD.requires_grad_()
    out_TD = layer.forward(x_TD)
    torch.cuda.synchronize()
    forward_s = time.perf_counter() - start
    layer.gradients(x_TD, out_TD, problem.dy_TD)
    torch.cuda.synchronize()
    return {
        "layer": name,
        "forward_s": round(forward_s, 3),
        "both_s": round(time.perf_counter() - start, 3),
        "machine": machine.describe_gpu(),
        "versions": layer.versions(),
    }


def _bits(name: str, shape: Shape, routings: list[RoutingKind]) -> dict[str, Any]:
    on_gpu = torch.cuda.is_available()
    result: dict[str, Any] = {"layer": name, "hashes": {}, "machine": machine.describe_gpu() if on_gpu else {}}
    for routing in routings:
        problem = make_problem(shape, routing, "cuda" if on_gpu else "cpu")
        layer = LAYERS[name](problem)
        check_rows(layer.rows_per_expert(problem.x_TD), shape, routing)
        result["hashes"][routing] = hash_step(layer, problem)
        # Without a GPU nothing is compiled, and NVRTC may be missing.
        result["versions"] = layer.versions() if on_gpu else machine.versions(layer.packages)
    return result


def hash_step(layer: Layer, problem: Problem) -> dict[str, str]:
    """SHA-256 of the output and of each gradient of one forward and backward."""
    x_TD = problem.x_TD.requires_grad_()
    out_TD = layer.forward(x_TD)
    gradients = layer.gradients(x_TD, out_TD, problem.dy_TD)
    return {name: hash_tensor(t) for name, t in zip(TENSORS, [out_TD, *gradients], strict=True)}


def hash_tensor(tensor: torch.Tensor) -> str:
    """SHA-256 over shape, dtype and the SHA-256s of 64 MiB pieces, which several threads take at once."""
    content = memoryview(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]
    pieces = [content[at : at + _HASH_BYTES] for at in range(0, len(content), _HASH_BYTES)]
    with ThreadPoolExecutor(8) as pool:
        digests = pool.map(lambda piece: hashlib.sha256(piece).digest(), pieces)
        whole = hashlib.sha256(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        for digest in digests:
            whole.update(digest)
    return whole.hexdigest()
