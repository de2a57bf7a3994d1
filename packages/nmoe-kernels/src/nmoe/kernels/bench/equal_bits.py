"""`equal-bits`: whether fresh processes with one seed give the same bits, forward and backward."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nmoe.kernels.bench import results
from nmoe.kernels.bench.problem import RoutingKind, Shape
from nmoe.kernels.bench.processes import run_process

Hashes = Mapping[str, Mapping[str, str]]
"""SHA-256 by routing, then by tensor."""
_NONE = "none"


def print_equal_bits(
    shape: Shape,
    routings: Sequence[RoutingKind],
    processes: int,
    timeout_s: float,
    *,
    command: str,
    output: Path | None,
    run: Callable[..., Mapping[str, Any]] = run_process,
) -> bool:
    """Runs the processes one after another, prints what they gave, and says whether all gave the same.

    What all gave, also where it differs, is written to `output` with what `results.header` gives; nothing where a
    process failed.
    """
    arguments = ["--task", "bits", "--shape", str(shape), "--routing", ",".join(routings)]
    given: list[Mapping[str, Any]] = []
    for number in range(1, processes + 1):
        result = run(arguments, timeout_s=timeout_s)
        if "error" in result:
            print(f"process {number} of {processes} failed: {result['error']}", flush=True)
            return False
        given.append(result)
    hashes = [result["hashes"] for result in given]
    counts = count_hashes(hashes)
    for name, processes_of in counts.items():
        print("\n".join(f"{name:18} {value}  {n} of {processes}" for value, n in processes_of.items()))
    differ = differences(hashes)
    for line in differ:
        print(f"differs: {line}")
    print(f"{shape}: {processes} processes, {'NOT the same bits' if differ else 'the same bits in all'}", flush=True)
    found = results.header(command, given[0]["machine"], given[0]["versions"]) | {
        "shape": str(shape),
        "processes": processes,
        "same_bits": not differ,
        "processes_by_sha256": counts,
    }
    results.write(found, output)
    return not differ


def differences(hashes: Sequence[Hashes]) -> list[str]:
    """Where a process's hashes are not the first one's, or not of the same tensors."""
    first = _flat(hashes[0])
    found = []
    for number, one in enumerate(hashes[1:], 2):
        other = _flat(one)
        names = [name for name in {**first, **other} if first.get(name) != other.get(name)]
        found += [
            f"{name} of process {number}: {other.get(name, _NONE)}, of process 1: {first.get(name, _NONE)}"
            for name in names
        ]
    return found


def count_hashes(hashes: Sequence[Hashes]) -> dict[str, dict[str, int]]:
    """How many processes gave each hash, by `routing/tensor`; `none` for those that lack the tensor."""
    flat = [_flat(one) for one in hashes]
    counts = {}
    for name in dict.fromkeys(name for one in flat for name in one):
        values = [one.get(name, _NONE) for one in flat]
        counts[name] = {value: values.count(value) for value in dict.fromkeys(values)}
    return counts


def _flat(hashes: Hashes) -> dict[str, str]:
    return {f"{routing}/{name}": value for routing, named in hashes.items() for name, value in named.items()}
