"""What the scripts share that run a kernel in Triton's interpreter: cases in one file, results in another."""

import sys
from collections.abc import Callable
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
