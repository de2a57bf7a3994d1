"""What the scripts share that run a kernel in Triton's interpreter: cases in one file, results in another.

As a program it runs such scripts: for each line `SCRIPT<tab>IN<tab>OUT<tab>LOG` of its standard input, in a fork, which
has its imports from here; these take as long as most cases. It answers with a line: the fork's exit code.
"""

import os
import runpy
import sys
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def _teach_ranges() -> None:
    """Triton 3.6 turns its scalars, arrays of one element, into a range's ends in a way that NumPy 2.4 refuses."""
    patch = interpreter._patch_lang_tensor

    def patch_tensor(tensor: type[tl.tensor], *scope: Any) -> None:
        patch(tensor, *scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    interpreter._patch_lang_tensor = patch_tensor


def run_cases(run: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> None:
    """Every case of the file that the command names first, into the file that it names second.

    Both are `.npz` with arrays `<case>/<name>`; `run` takes the arrays of one case, and returns its results.
    """
    _teach_ranges()
    arrays = np.load(sys.argv[1], allow_pickle=False)
    cases: dict[str, dict[str, np.ndarray]] = {}
    for key in arrays.files:
        case, name = key.split("/")
        cases.setdefault(case, {})[name] = arrays[key]
    results = {f"{case}/{name}": array for case, inputs in cases.items() for name, array in run(inputs).items()}
    np.savez(sys.argv[2], **results)


def fork_script(script: str, given: str, results: str, log: str) -> int:
    """Exit code of a script that runs in a fork of this process."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = 1
    try:
        with Path(log).open("wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.argv = [script, given, results]
        runpy.run_path(script, run_name="__main__")
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    import_module("torch._dynamo")  # by the first call of an op of ours
    for line in sys.stdin:
        print(fork_script(*line.rstrip("\n").split("\t")), flush=True)
