"""`cold`: how long a fresh process with an empty kernel cache takes to the end of its first forward and backward."""

import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nmoe.kernels.bench import results
from nmoe.kernels.bench.problem import Shape
from nmoe.kernels.bench.processes import run_process
from nmoe.kernels.errors import KernelError


def print_cold(
    shape: Shape,
    timeout_s: float,
    *,
    command: str,
    output: Path | None,
    run: Callable[..., Mapping[str, Any]] = run_process,
) -> None:
    """Prints the seconds, and writes them to `output` with what `results.header` gives.

    `forward_s` and `both_s` count from before the layer is built, `process_s` from the process's start to its end.

    Raises:
        KernelError: the process failed; nothing is written.
    """
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        result = run(
            ["--task", "cold", "--shape", str(shape)],
            timeout_s=timeout_s,
            environment={"NMOE_KERNEL_CACHE": f"{folder}/kernels", "TRITON_CACHE_DIR": f"{folder}/triton"},
        )
        process_s = time.perf_counter() - start
        compiled = len(list(Path(folder).rglob("*.cubin")))
    if "error" in result:
        raise KernelError(
            f"expected a first forward and backward of {shape}, found {result['error']}: see python -m "
            "nmoe.kernels.selftest"
        )
    found = results.header(command, result["machine"], result["versions"]) | {
        "shape": str(shape),
        "kernels_compiled": compiled,
        "forward_s": result["forward_s"],
        "both_s": result["both_s"],
        "process_s": round(process_s, 2),
    }
    print(
        f"{shape}: first forward {found['forward_s']:.2f} s, forward and backward {found['both_s']:.2f} s "
        f"({compiled} kernels compiled); the whole process {process_s:.1f} s"
    )
    results.write(found, output)
