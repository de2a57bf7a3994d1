"""`python -m nmoe.rdep.bench`: the exchange beside NCCL and plain copies, and MoE layers on 1, 2, 4, … GPUs.

Starts one process a GPU for each number of ranks in turn. See `nmoe.rdep.bench.exchange` and `.layer` for what each
figure is.
"""

import argparse
import json
import os
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from nmoe.kernels.bench.machine import describe_gpu, versions
from nmoe.kernels.bench.results import header, write
from nmoe.rdep.bench.report import print_report


def main(arguments: list[str]) -> int:
    """Measures and prints; exit code 1 if a number of ranks could not be measured."""
    parser = argparse.ArgumentParser(prog="python -m nmoe.rdep.bench", description=__doc__)
    parser.add_argument("--ranks", default=None, help="numbers of GPUs, such as 1,2,4 (default: what there is)")
    parser.add_argument("--tokens", default="128,1024,8192,32768", help="tokens a rank, for the exchange")
    parser.add_argument("--timeout", type=float, default=240.0, help="seconds for each number of ranks")
    parser.add_argument("--output", type=Path, default=None, help="a JSON file")
    options = parser.parse_args(arguments)
    found = torch.cuda.device_count()
    sizes = [int(n) for n in options.ranks.split(",")] if options.ranks else [n for n in (1, 2, 4, 8) if n <= found]
    if any(64 % size for size in sizes):  # the least number of experts that is measured
        parser.error(f"expected --ranks that divide 64 experts, found {options.ranks}")
    if not sizes or max(sizes) > found:
        parser.error(f"expected --ranks of at most the {found} GPUs that there are, found {options.ranks or 'none'}")
    command = shlex.join(["python", "-m", "nmoe.rdep.bench", *_without_output(arguments)])
    results = header(command, describe_gpu(), versions(("cuda-core", "cuda-bindings")))
    results |= {"nccl": ".".join(map(str, torch.cuda.nccl.version())), "ranks": {}}
    failed = False
    for size in sizes:
        measured = _measure(size, options.tokens, options.timeout)
        failed |= "error" in measured
        results["ranks"][str(size)] = measured
        print_report(size, measured)
        write(results, options.output)
    return int(failed)


def _measure(size: int, tokens: str, timeout_s: float) -> dict[str, Any]:
    """What rank 0 of `size` workers tells, or `{"error": …}`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, "-m", "nmoe.rdep.bench.worker", tokens, str(result)]
        common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        workers = [subprocess.Popen(command, env=os.environ | common | {"RANK": str(rank)}) for rank in range(size)]
        deadline = time.monotonic() + timeout_s
        try:
            while not all(worker.poll() == 0 for worker in workers):
                codes = [worker.poll() for worker in workers]
                if any(codes):
                    return {"error": f"the ranks ended with {codes}: see above"}
                if time.monotonic() > deadline:
                    return {"error": f"took longer than {timeout_s:g} s: give it more with --timeout"}
                time.sleep(0.05)
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
        return dict(json.loads(result.read_text()))


def _without_output(arguments: list[str]) -> list[str]:
    """A JSON should not tell where it was written."""
    kept = list(arguments)
    if "--output" in kept:
        at = kept.index("--output")
        del kept[at : at + 2]
    return kept


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
