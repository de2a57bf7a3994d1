"""`equal-bits`: whether fresh processes with one seed give the same bits, forward and backward."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nmoe.kernels.bench.problem import RoutingKind, Shape
from nmoe.kernels.bench.processes import run_process

Hashes = Mapping[str, Mapping[str, str]]
"""SHA-256 by routing, then by tensor."""


def print_equal_bits(
    shape: Shape,
    routings: Sequence[RoutingKind],
    processes: int,
    timeout_s: float,
    *,
    run: Callable[..., Mapping[str, Any]] = run_process,
) -> bool:
    """Runs the processes one after another, prints what they gave, and says whether all gave the same."""
    arguments = ["--task", "bits", "--shape", str(shape), "--routing", ",".join(routings)]
    results: list[Hashes] = []
    for number in range(1, processes + 1):
        result = run(arguments, timeout_s=timeout_s)
        if "error" in result:
            print(f"process {number} of {processes} failed: {result['error']}", flush=True)
            return False
        results.append(result["hashes"])
    print("\n".join(hash_lines(results)))
    differ = differences(results)
    for line in differ:
        print(f"differs: {line}")
    print(f"{shape}: {processes} processes, {'NOT the same bits' if differ else 'the same bits in all'}", flush=True)
    return not differ


def differences(results: Sequence[Hashes]) -> list[str]:
    """Where a process's hashes are not the first one's, or not of the same tensors."""
    first = _flat(results[0])
    found = []
    for number, result in enumerate(results[1:], 2):
        other = _flat(result)
        names = [name for name in {**first, **other} if first.get(name) != other.get(name)]
        found += [f"{name} of process {number}: {other.get(name)}, of process 1: {first.get(name)}" for name in names]
    return found


def hash_lines(results: Sequence[Hashes]) -> list[str]:
    """Each tensor's hashes, and how many processes gave each."""
    lines = []
    for name in _flat(results[0]):
        given = [_flat(result).get(name, "none") for result in results]
        lines += [f"{name:18} {value}  {given.count(value)} of {len(given)}" for value in dict.fromkeys(given)]
    return lines


def _flat(hashes: Hashes) -> dict[str, str]:
    return {f"{routing} {name}": value for routing, named in hashes.items() for name, value in named.items()}
