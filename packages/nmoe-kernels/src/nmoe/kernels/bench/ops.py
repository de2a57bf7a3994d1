"""`ops`: each hot op of a training step by itself, forward and backward, beside its bound."""

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from nmoe.kernels.bench import machine, results
from nmoe.kernels.bench.op_case import Case, Peer, Setting
from nmoe.kernels.bench.op_cases import cases_of
from nmoe.kernels.bench.op_report import failures, make_beside, make_row, markdown, named, rounded, text_line
from nmoe.kernels.bench.op_timing import Rates, copies_of, measure_rates, release, repeats_of, same_bits, time_make
from nmoe.kernels.bench.peers import NmoeLayer
from nmoe.kernels.bench.worker import describe_error

NOTE = (
    "Medians of CUDA graphs of one repeat or more, over copies of the tensors that fill the L2 four times. The bound "
    "is the longer of bytes over the copy's rate (each input read once, each output written once) and FLOP over the "
    "product's rate; 'of it' is the bound over the time. Attention counts half of S² pairs, or those within its "
    "window; Muon's products count in full; cross-entropy's bare products are of whole matrices, to fp32, bf16 "
    "and fp32. Same bits: ours / the other's, of five backwards on the same inputs."
)
MATMUL_TFLOPS = {"NVIDIA H200": 788.0}
"""A large bf16 product's, as docs/performance.md gives it: a share of it compares runs on GPUs of other clocks."""


@dataclass(frozen=True)
class Bench:
    """What measures on the device at hand."""

    setting: Setting
    l2_bytes: int
    rates: Rates

    def measure(self, case: Case) -> dict[str, Any]:
        """A row: our time, then the peer's; a peer that fails is told in the row.

        Raises:
            Exception: whatever our op raises.
        """
        copies = copies_of(case.work, self.l2_bytes)
        repeats = repeats_of(copies, self.rates.bound_ms(case.work))
        ms = time_make(case.make, self.setting, copies, repeats).median_ms
        row = make_row(case, ms, self.rates) | {"copies": copies, "repeats": repeats}
        if case.compare_bits:
            row["equal_bits"] = same_bits(case.make, self.setting)
        if case.peer is not None:
            row["beside"] = {"name": case.peer.name} | self._beside(case, case.peer, ms, copies, repeats)
        return row

    def _beside(self, case: Case, peer: Peer, own_ms: float, copies: int, repeats: int) -> dict[str, Any]:
        try:
            beside = make_beside(case, time_make(peer.make, self.setting, copies, repeats).median_ms, own_ms)
            if case.compare_bits:
                beside["equal_bits"] = same_bits(peer.make, self.setting)
            return beside
        except Exception as error:  # a peer may raise anything: it is told, not raised
            return {"error": describe_error(error)}

    def clocks(self) -> dict[str, Any]:
        """As `machine.clocks`."""
        return machine.clocks()


def start_bench() -> Bench:
    """The native ops on the current GPU, and the rates it reaches.

    Raises:
        UnsupportedArchError: the native tier has no kernels for it.
    """
    from nmoe.kernels.ops import select_ops

    setting = Setting(select_ops("native", "cuda"), "cuda")
    l2_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return Bench(setting, l2_bytes, measure_rates(setting))


def print_ops(
    names: Sequence[str],
    *,
    command: str,
    output: Path | None,
    start: Callable[[], Bench] = start_bench,
    cases: Callable[[Sequence[str]], Sequence[Case]] = cases_of,
) -> bool:
    """Measures in this process and prints; says whether all was measured and every ratio is kept.

    What came so far is written to `output` after each case: `results.header`'s, `note`, `clocks`, `rates`, `rows`.

    Raises:
        UnsupportedArchError: the native tier has no kernels for the GPU.
    """
    bench = start()
    gpu = machine.describe_gpu()
    written = results.header(command, gpu, _versions()) | {
        "note": NOTE,
        "clocks": {"before": bench.clocks()},
        "rates": {
            "copy_tb_s": rounded(bench.rates.copy_bytes_per_s / 1e12),
            "matmul_tflops": rounded(bench.rates.matmul_flop_per_s / 1e12),
        },
        "rows": [],
    }
    for case in cases(names):
        row = _measure(bench, case)
        if case.most_of_peer is not None and "error" not in row:
            row["most_of_peer"] = case.most_of_peer
        if "tflops" in row and gpu["gpu"] in MATMUL_TFLOPS:
            row[f"share_of_{MATMUL_TFLOPS[gpu['gpu']]:g}_tflops"] = round(row["tflops"] / MATMUL_TFLOPS[gpu["gpu"]], 3)
        written["rows"].append(row)
        print(text_line(row), flush=True)
        results.write(written, output)
    written["clocks"]["after"] = bench.clocks()
    results.write(written, output)
    print("\n" + markdown(written), flush=True)
    told = failures(written["rows"])
    for line in told:
        print(f"error: {line}", file=sys.stderr)
    return not told


def _measure(bench: Bench, case: Case) -> dict[str, Any]:
    try:
        torch.manual_seed(0)
        row = bench.measure(case)
    except Exception as error:  # one op that fails must not hide the others
        row = named(case) | {"error": describe_error(error)}
    with suppress(RuntimeError):  # a device that this case broke tells so in the next one
        release()
    return row


def _versions() -> dict[str, Any]:
    from nmoe.kernels.runtime.nvrtc import nvrtc_version

    found = machine.versions(NmoeLayer.packages) | {"nvrtc": nvrtc_version()}
    return found | {"cudnn": str(torch.backends.cudnn.version())}
