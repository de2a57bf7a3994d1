"""`cold`: how long a fresh process with an empty kernel cache takes to the end of its first forward and backward."""

import json
import tempfile
import time
from pathlib import Path

from nmoe.kernels.bench.problem import Shape
from nmoe.kernels.bench.processes import run_process
from nmoe.kernels.errors import KernelError


def print_cold(shape: Shape, timeout_s: float) -> None:
    """Prints seconds and a JSON line.

    Raises:
        KernelError: the process failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        result = run_process(
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
    print(
        f"{shape}: first forward {result['forward_s']:.2f} s, forward and backward {result['both_s']:.2f} s "
        f"({compiled} kernels compiled); the whole process {process_s:.1f} s"
    )
    print(json.dumps({"shape": str(shape), "kernels": compiled, "process_s": round(process_s, 2), **result}))
