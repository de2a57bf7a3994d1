"""Results as text: an aligned table while they come, and a Markdown table made from the JSON alone."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from nmoe.kernels.bench.problem import Shape, parse_shape

COLUMNS = ("T, D, F, E, K", "routing", "layer", "forward", "forward+backward", "same, eager", "rows max/mean")
MEASURES = {"forward_graph": "forward_flop", "both_graph": "both_flop", "both_eager": "both_flop"}
PUBLISHED_FORWARD = {
    ("sonic", Shape(40960, 768, 256, 128, 8)): 341.0,
    ("sonic", Shape(24576, 1536, 256, 128, 8)): 370.0,
    ("sonic", Shape(32768, 4096, 512, 128, 8)): 509.0,
}
"""TFLOP/s that a peer's authors give, on an H100 (arXiv:2512.14080)."""
_LEAST_OF_PUBLISHED = 0.9


def tflops(flop: float, ms: float) -> float:
    """10¹² operations a second."""
    return flop / ms / 1e9


def summarise(shape: Shape, routing: str, layer: str, rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One row of the results: medians over rounds of each round's median, and their spread.

    Args:
        shape: of the layer.
        routing: as asked.
        layer: which one.
        rounds: what the worker gave in each round; a round that failed has an `error`.

    Returns:
        A measure has `ms`, `tflops`, `spread` (slowest over fastest round, less 1) and `rounds_ms`; or
        `not_measured`, with the reason. `first_s` are seconds of the first two steps, with what they compile and tune.
    """
    good = [result for result in rounds if "error" not in result]
    errors = [str(result["error"]) for result in rounds if "error" in result]
    row: dict[str, Any] = {"shape": str(shape), "routing": routing, "layer": layer, "rounds": len(good)}
    if good:
        row |= {key: good[0][key] for key in ("weight_grad", "rows_max_over_mean", "memory_bytes")}
        row["first_s"] = [result["first_s"] for result in good]
        row["clocks_under_load"] = [result["clocks"]["under_load"] for result in good]
    for measure, flop in MEASURES.items():
        times = [result["times"][measure]["ms"] for result in good if measure in result["times"]]
        if not times:
            reasons = [*(result["not_measured"].get(measure, "") for result in good), *errors]
            row[measure] = {"not_measured": next((reason for reason in reasons if reason), "no round was run")}
            continue
        ms = median(times)
        row[measure] = {
            "ms": round(ms, 4),
            "tflops": round(tflops(getattr(shape, flop), ms), 1),
            "spread": round(max(times) / min(times) - 1, 4),
            "rounds_ms": [round(t, 4) for t in times],
        }
    if errors and good:
        row["failed_rounds"] = errors
    published = PUBLISHED_FORWARD.get((layer, shape)) if routing == "uniform" else None
    found = row["forward_graph"].get("tflops")
    if published and found is not None and found < _LEAST_OF_PUBLISHED * published:
        row["void"] = f"forward under {_LEAST_OF_PUBLISHED} of the published {published:g} TFLOP/s: set up wrongly"
    return row


def text_lines(row: Mapping[str, Any]) -> list[str]:
    """The row's cells, aligned, and below them why a measure is missing or void."""
    cells = [row["shape"].ljust(27), row["routing"].ljust(8), row["layer"].ljust(6)]
    notes = [f"  void: {row['void']}"] if "void" in row else []
    notes += [f"  a round failed: {error}" for error in row.get("failed_rounds", ())]
    missing: dict[str, list[str]] = {}
    for measure in MEASURES:
        found = row[measure]
        if "ms" in found:
            cells.append(f"{found['ms']:9.3f} ms {found['tflops']:6.1f} TFLOP/s ±{found['spread'] * 50:4.1f}%")
        else:
            cells.append("not measured".rjust(34))
            missing.setdefault(found["not_measured"], []).append(measure)
    notes += [f"  {', '.join(names)} not measured: {reason}" for reason, names in missing.items()]
    ratio = row.get("rows_max_over_mean")
    cells.append("" if ratio is None else f"{ratio:6.2f}")
    return ["  ".join(cells).rstrip(), *notes]


def text_header() -> str:
    """Above `text_lines`."""
    heads = [COLUMNS[0].ljust(27), COLUMNS[1].ljust(8), COLUMNS[2].ljust(6)]
    return "  ".join([*heads, *(measure.rjust(34) for measure in MEASURES), "max/mean"])


def markdown(results: Sequence[Mapping[str, Any]]) -> str:
    """A table of TFLOP/s (ms), one row for each shape, routing and layer, with what it was measured on."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    notes: list[str] = []
    for result in results:
        for row in result["rows"]:
            sizes = ", ".join(str(parse_shape(row["shape"])).split(","))
            cells = [_cell(row[measure], notes) for measure in MEASURES]
            void = f" (void{_note(row['void'], notes)})" if "void" in row else ""
            ratio = row.get("rows_max_over_mean")
            cells.append("–" if ratio is None else f"{ratio:.2f}")
            lines.append(f"| {' | '.join([sizes, row['routing'], row['layer'] + void, *cells])} |")
    lines.append("")
    for result in results:
        machine, version = result["machine"], result["versions"]
        told = "; ".join(
            f"{layer}: {', '.join(f'{name} {number}' for name, number in found.items())}"
            for layer, found in version.items()
        )
        lines.append(
            f"TFLOP/s (ms) on one {machine.get('gpu', 'unknown GPU')}, driver {machine.get('driver') or 'unknown'}, "
            f"{result['date']}; {told}. {result['note']}"
        )
    lines += [f"[{index}] {note}" for index, note in enumerate(notes, 1)]
    return "\n".join(lines)


def _cell(found: Mapping[str, Any], notes: list[str]) -> str:
    if "ms" in found:
        return f"{found['tflops']:.0f} ({found['ms']:.2f})"
    return f"not measured{_note('not measured: ' + found['not_measured'], notes)}"


def _note(text: str, notes: list[str]) -> str:
    if text not in notes:
        notes.append(text)
    return f" [{notes.index(text) + 1}]"
