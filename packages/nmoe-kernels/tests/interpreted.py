"""What the scripts share that run a kernel in Triton's interpreter: cases in one file, results in another."""

import sys
from collections.abc import Callable

import numpy as np


def run_cases(run: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> None:
    """Every case of the file that the command names first, into the file that it names second.

    Both are `.npz` with arrays `<case>/<name>`; `run` takes the arrays of one case, and returns its results.
    """
    arrays = np.load(sys.argv[1], allow_pickle=False)
    cases: dict[str, dict[str, np.ndarray]] = {}
    for key in arrays.files:
        case, name = key.split("/")
        cases.setdefault(case, {})[name] = arrays[key]
    results = {f"{case}/{name}": array for case, inputs in cases.items() for name, array in run(inputs).items()}
    np.savez(sys.argv[2], **results)
