"""The native experts' distance from float64 against that of the same layer of PyTorch's bf16 ops (`-m gpu`)."""

import json
from pathlib import Path

import pytest
import torch
from nmoe.kernels.bench.__main__ import main
from nmoe.kernels.bench.accuracy import TENSORS, measure_distances
from nmoe.kernels.bench.problem import Shape

needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)


@pytest.mark.gpu
@needs_hopper
def test_errors_are_at_most_those_of_torch() -> None:
    for name, distances in measure_distances().items():
        print(f"{name}: ours {distances.ours:.2e}, torch {distances.torch:.2e}")
        assert distances.kept, name


@pytest.mark.gpu
@needs_hopper
def test_command_writes_the_distances(tmp_path: Path) -> None:
    file = tmp_path / "accuracy.json"
    assert main(["accuracy", "--output", str(file)]) == 0
    found = json.loads(file.read_text(encoding="utf-8"))
    assert found["machine"]["gpu"] == torch.cuda.get_device_name()
    assert tuple(found["distances"]) == TENSORS


def test_distances_are_of_the_same_layer() -> None:
    """Ours, PyTorch's and the exact one are one function, from one seed: only bf16's rounding lies between them.

    bf16 keeps 8 bits, so one rounding is off by 2^-9 relative at most, and each tensor has about six of them behind it;
    with another order of rows, gate or product the distance would be near 1. One at 0 would be measured against itself.
    """
    found = measure_distances(Shape(64, 32, 16, 4, 2), "cpu")
    assert tuple(found) == TENSORS
    for name, distances in found.items():
        for one in (distances.ours, distances.torch):
            assert 2**-12 < one < 6 * 2**-9, name
    assert measure_distances(Shape(64, 32, 16, 4, 2), "cpu") == found
