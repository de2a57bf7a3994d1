"""`ops` as text: a line while each case comes, and a Markdown table made from the JSON alone."""

from collections.abc import Mapping, Sequence
from typing import Any

from nmoe.kernels.bench.op_case import Case
from nmoe.kernels.bench.op_timing import Rates
from nmoe.kernels.bench.report import tflops

COLUMNS = ("op", "part", "shape", "ms", "rate", "bound, ms", "of it", "beside", "our time over its", "same bits")


def make_row(case: Case, ms: float, rates: Rates) -> dict[str, Any]:
    """What is known of our own time: `share` is the bound over it."""
    bound_ms = rates.bound_ms(case.work)
    row = named(case) | {
        "ms": rounded(ms),
        "bytes": case.work.bytes,
        "flop": case.work.flop,
        "bound_ms": rounded(bound_ms),
        "bound_by": rates.bound_by(case.work),
        "share": round(bound_ms / ms, 3),
    }
    if case.work.flop:
        row["tflops"] = round(tflops(case.work.flop, ms), 1)
    return row


def make_beside(case: Case, ms: float, own_ms: float) -> dict[str, Any]:
    """What is known of the peer's time: `ratio` is ours over it."""
    beside: dict[str, Any] = {"ms": rounded(ms), "ratio": round(own_ms / ms, 3)}
    if case.work.flop:
        beside["tflops"] = round(tflops(case.work.flop, ms), 1)
    return beside


def named(case: Case) -> dict[str, Any]:
    """What a row begins with."""
    return {"op": case.op, "part": case.part, "shape": case.shape}


def rounded(ms: float) -> float:
    """To five digits."""
    return float(f"{ms:.5g}")


def failures(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Our own ops that were not measured, and ratios that are above what they may be or that nothing stands beside."""
    told = []
    for row in rows:
        name = f"{row['op']} {row['part']} {row['shape']}"
        if "error" in row:
            told.append(f"{name} not measured: {row['error']}")
        elif "most_of_peer" in row:
            beside, most = row["beside"], row["most_of_peer"]
            if "error" in beside:
                told.append(f"{name}: expected at most {most} times {beside['name']}, which failed: {beside['error']}")
            elif not beside["ratio"] <= most:
                told.append(f"{name}: expected at most {most} times {beside['name']}, found {beside['ratio']}")
    return told


def text_line(row: Mapping[str, Any]) -> str:
    """The row's cells, aligned, with what went wrong."""
    notes: list[str] = []
    cells = _cells(row, notes)
    widths = (20, 15, 26, 9, 12, 16, 5, 22, 5, 9)
    line = "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
    return "\n".join([line, *(f"  [{index}] {note}" for index, note in enumerate(notes, 1))])


def markdown(result: Mapping[str, Any]) -> str:
    """A table of one file of `ops`, with what it was measured on."""
    notes: list[str] = []
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    lines += [f"| {' | '.join(_cells(row, notes))} |" for row in result["rows"]]
    machine, rates = result["machine"], result["rates"]
    found = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    lines += [
        "",
        f"One {machine.get('gpu', 'unknown GPU')}, driver {machine.get('driver') or 'unknown'}, {result['date']}; "
        f"{found}. Rates of this run: {rates['copy_tb_s']} TB/s of a copy, {rates['matmul_tflops']} TFLOP/s of a bf16 "
        f"product. {result['note']}",
        *(f"[{index}] {note}" for index, note in enumerate(notes, 1)),
    ]
    return "\n".join(lines)


def _cells(row: Mapping[str, Any], notes: list[str]) -> list[str]:
    named_cells = [row["op"], row["part"], row["shape"]]
    if "error" in row:
        return [*named_cells, f"not measured{_note(row['error'], notes)}", *["–"] * (len(COLUMNS) - 4)]
    rate = f"{row['tflops']:.0f} TFLOP/s" if "tflops" in row else f"{row['bytes'] / row['ms'] / 1e9:.2f} TB/s"
    bound = f"{row['bound_ms']:.4g} ({row['bound_by']})"
    cells = [*named_cells, f"{row['ms']:.4g}", rate, bound, f"{row['share']:.0%}"]
    beside = row.get("beside")
    bits = [_said(one["equal_bits"]) for one in (row, beside or {}) if "equal_bits" in one]
    if beside is None:
        return [*cells, "–", "–", " / ".join(bits) or "–"]
    if "error" in beside:
        return [*cells, f"{beside['name']}: not measured{_note(beside['error'], notes)}", "–", " / ".join(bits) or "–"]
    return [*cells, f"{beside['name']}: {beside['ms']:.4g} ms", f"{beside['ratio']:.2f}", " / ".join(bits) or "–"]


def _said(equal: bool) -> str:
    return "yes" if equal else "no"


def _note(text: str, notes: list[str]) -> str:
    if text not in notes:
        notes.append(text)
    return f" [{notes.index(text) + 1}]"
