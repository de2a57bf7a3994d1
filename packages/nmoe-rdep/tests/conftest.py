"""What the tests share: the launcher of ranks, and which of them need GPUs."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked `gpu`, or `multigpu(n)` for n GPUs of one host, need no `skipif` of their own."""
    marker = item.get_closest_marker("multigpu")
    needed = (marker.args[0] if marker.args else 2) if marker else 1 if item.get_closest_marker("gpu") else 0
    found = torch.cuda.device_count() if needed else 0
    if found < needed:
        pytest.skip(f"needs {needed} CUDA GPUs, found {found}")


@pytest.fixture(scope="session")
def ranks() -> ModuleType:
    """The module `ranks.py`, which the tests' import mode does not find by its name."""
    spec = importlib.util.spec_from_file_location("nmoe_rdep_test_ranks", Path(__file__).with_name("ranks.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
