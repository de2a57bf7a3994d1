"""The figures as text."""

from collections.abc import Mapping
from typing import Any


def print_report(size: int, measured: Mapping[str, Any]) -> None:
    """One number of ranks."""
    print(f"\n{size} GPU{'s' if size > 1 else ''}")
    if "error" in measured:
        print(f"  {measured['error']}")
        return
    if measured["exchange"]:
        print(
            "  bytes that leave a GPU, GB/s (µs); a dispatch and a return in a graph, µs: alone, with the index, NCCL's"
        )
        columns = ("dispatch", "return", "with its sum", "NCCL", "copy engines", "pairs")
        print("  tokens     MB   " + "".join(column.ljust(18) for column in columns))
    for row in measured["exchange"]:
        pairs = (
            f"{row[f'{name}_gb_s']:6.0f} ({row[f'{name}_us']:7.1f})"
            for name in ("dispatch", "return", "combine", "nccl", "copy_engines")
        )
        print(
            f"  {row['tokens']:6d} {row['crossing_bytes'] / 1e6:6.1f}   {'  '.join(pairs)} "
            f"{row['pair_graph_us']:7.1f} {row['indexed_pair_graph_us']:7.1f} {row['nccl_pair_graph_us']:7.1f}"
        )
    print("  TFLOP/s a GPU        forward  backward  both")
    for name, row in measured["layers"].items():
        print(
            f"  {name:24s} {row['forward_tflops']:5.0f} {row['backward_tflops']:9.0f} "
            f"{row['forward_backward_tflops']:5.0f}"
        )
