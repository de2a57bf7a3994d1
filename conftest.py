"""What holds for every package's tests."""

import os
import sys

import pytest

LONGEST_FIRST = (
    "test_compile.py",
    "test_ranks.py",
    "test_expert_parallel.py",
    "test_choice.py",
    "test_eval_command.py",
    "test_model_commands.py",
    "test_ranks_command.py",
    "test_kill_and_resume.py",
    "test_eval_ranks.py",
    "test_world.py",
    "test_generate.py",
    "test_train_command.py",
    "test_bench_command.py",
    "test_loop.py",
)
"""Files of about 20 s and more: a run in several processes should not begin one of them last."""

# Tests start some hundred processes: what these import is compiled once, whatever the environment says.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Orders files as processes are to take them; the order within a file stays."""
    items.sort(key=lambda item: LONGEST_FIRST.index(item.path.name) if item.path.name in LONGEST_FIRST else sys.maxsize)
