"""The `[rdep]` section: closed, frozen, and free of torch."""

import subprocess
import sys

import pytest
from nmoe.rdep.schema import RdepConfig
from pydantic import ValidationError


def test_default_is_local() -> None:
    assert RdepConfig().transport == "local"


@pytest.mark.parametrize("section", [{"transport": "nccl"}, {"transprot": "local"}, {"transport": None}])
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
