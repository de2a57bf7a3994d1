"""The `[rdep]` section: closed, frozen, and free of torch."""

import subprocess
import sys

import pytest
from nmoe.rdep.schema import RdepConfig
from pydantic import ValidationError

CHOICES = {(1, "cpu"): "local", (1, "cuda"): "local", (2, "cpu"): "shm", (8, "cuda"): "ipc"}


@pytest.mark.parametrize(("ranks", "device"), CHOICES)
def test_an_absent_transport_is_the_one_that_ranks_and_device_need(ranks: int, device: str) -> None:
    assert RdepConfig().transport_for(ranks, device) == CHOICES[ranks, device]
    assert RdepConfig().problems(ranks, device) == []


@pytest.mark.parametrize("transport", ["local", "ipc", "shm"])
@pytest.mark.parametrize(("ranks", "device"), CHOICES)
def test_a_set_transport_stays_and_one_that_cannot_serve_is_named_with_the_remedy(
    transport: str, ranks: int, device: str
) -> None:
    config, needed = RdepConfig(transport=transport), CHOICES[ranks, device]
    assert config.transport_for(ranks, device) == transport, "nothing falls back"
    problems = config.problems(ranks, device)
    assert bool(problems) == (transport != needed)
    for problem in problems:
        assert f"'{transport}'" in problem
        assert f"runtime.world_size = {ranks} and runtime.device = '{device}'" in problem
        assert f"use '{needed}'" in problem


@pytest.mark.parametrize(
    "section",
    [
        {"transport": "nccl"},
        {"transport": "hybrid"},
        {"transprot": "local"},
        {"capacity_factor": 0.99},
        {"timeout_s": 0},
    ],
)
def test_refuses_what_it_does_not_know(section: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        RdepConfig.model_validate(section)


def test_is_frozen() -> None:
    with pytest.raises(ValidationError):
        RdepConfig().transport = "ipc"


def test_schema_and_package_import_no_torch() -> None:
    code = "import sys, nmoe.rdep, nmoe.rdep.schema, nmoe.rdep.errors; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_is_there() -> None:
    import nmoe.rdep

    assert all(getattr(nmoe.rdep, name) is not None for name in nmoe.rdep.__all__)
    with pytest.raises(AttributeError, match="nonsense"):
        nmoe.rdep.nonsense


@pytest.mark.parametrize(("factor", "expected"), [(1.0, 512), (1.01, 768), (2.0, 1024), (4.0, 1024), (None, 1024)])
def test_capacity(factor: float | None, expected: int) -> None:
    """Whole blocks of 256 rows, and at most every token to all of this rank's experts."""
    config = RdepConfig(capacity_factor=factor)
    assert config.row_capacity(tokens=128, top_k=4, n_local=2, world_size=4) == expected
