"""`moe-layer`: the MoE layer beside its peers, each in processes of its own that take turns."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nmoe.kernels.bench.problem import RoutingKind, Shape
from nmoe.kernels.bench.processes import run_process, sonic_environment
from nmoe.kernels.bench.report import markdown, summarise, text_header, text_lines
from nmoe.kernels.bench.results import header, write

NOTE = (
    "One layer: router, top-k, experts, combine; training forward; random normal data; medians over rounds of medians. "
    "forward and forward+backward in a CUDA graph, then forward+backward eager. "
    "6·R·F·D operations forward, 18·R·F·D forward and backward. "
    "nmoe writes fp32 gradients of the experts' weights; SonicMoE and torch write bf16."
)

Runner = Callable[[str, Shape, RoutingKind], Mapping[str, Any]]


def process_runner(peer_path: str | None, timeout_s: float) -> Runner:
    """Runs one layer in a fresh process and gives its result, or `{"error": …}`."""

    def run(layer: str, shape: Shape, routing: RoutingKind) -> Mapping[str, Any]:
        return run_process(
            ["--layer", layer, "--shape", str(shape), "--routing", routing],
            timeout_s=timeout_s,
            environment=sonic_environment(peer_path) if layer == "sonic" else None,
        )

    return run


def compare(
    shapes: Sequence[Shape],
    layers: Sequence[str],
    routings: Sequence[RoutingKind],
    rounds: int,
    *,
    run: Runner,
    command: str,
    output: Path | None,
) -> dict[str, Any]:
    """Measures and prints; what came so far is written to `output` after each shape.

    Returns:
        The results: `machine`, `versions` by layer, `command`, `date` (UTC), `note`, `clocks`, `rows`.
    """
    results = header(command, {}, {}) | {"clocks": {}, "note": NOTE, "rounds": rounds, "rows": []}
    print(text_header(), flush=True)
    for routing in routings:
        for shape in shapes:
            for row in _compare_one(shape, layers, routing, rounds, run, results):
                results["rows"].append(row)
                print("\n".join(text_lines(row)), flush=True)
            write(results, output)
    print("\n" + markdown([results]), flush=True)
    return results


def _compare_one(
    shape: Shape, layers: Sequence[str], routing: RoutingKind, rounds: int, run: Runner, results: dict[str, Any]
) -> list[dict[str, Any]]:
    found: dict[str, list[Mapping[str, Any]]] = {layer: [] for layer in layers}
    for _ in range(rounds):
        for layer in layers:
            if found[layer] and "error" in found[layer][0]:
                continue  # what failed first fails again, and costs time
            result = run(layer, shape, routing)
            found[layer].append(result)
            if "error" not in result:
                results["machine"] = results["machine"] or result["machine"]
                results["versions"].setdefault(layer, result["versions"])
                results["clocks"].setdefault("before", result["clocks"]["before"])
                results["clocks"]["after"] = result["clocks"]["under_load"]
    return [summarise(shape, routing, layer, found[layer]) for layer in layers]


def failed(results: Mapping[str, Any]) -> list[str]:
    """Our own measures that are missing; a peer's are rows of the report."""
    return [
        f"{row['shape']} {row['routing']}: {row[measure]['not_measured']}"
        for row in results["rows"]
        if row["layer"] == "nmoe"
        for measure in ("forward_graph", "both_graph", "both_eager")
        if "not_measured" in row[measure]
    ]
