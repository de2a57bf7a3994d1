"""Every error that an nmoe package raises on purpose has an exit code of its own meaning."""

import errno
import importlib
import inspect

import pytest
from nmoe.cli.errors import CliError, ConfigError, ExitCode
from nmoe.cli.exit_codes import _CODES, exit_code_of

PACKAGES = ("kernels", "rdep", "model", "data", "train", "eval", "cli")


def errors_of(package):
    try:
        module = importlib.import_module(f"nmoe.{package}.errors")
    except ModuleNotFoundError:
        return []  # a package that raises none
    classes = [kind for _, kind in inspect.getmembers(module, inspect.isclass)]
    return [kind for kind in classes if issubclass(kind, Exception) and kind.__module__ == module.__name__]


@pytest.mark.parametrize("name", list(_CODES))
def test_every_name_in_the_table_is_an_error_that_exists(name):
    module, _, attribute = name.rpartition(".")
    assert issubclass(getattr(importlib.import_module(module), attribute), Exception)


@pytest.mark.parametrize("package", PACKAGES)
def test_no_typed_error_counts_as_unforeseen(package):
    for kind in errors_of(package):
        error = kind.__new__(kind)  # constructors differ; only the class matters
        assert exit_code_of(error) is not ExitCode.BUG, kind


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("nmoe.data.errors.CorruptShardError", ExitCode.DATA),
        ("nmoe.data.errors.TokenizerMismatchError", ExitCode.DATA),
        ("nmoe.data.errors.WriteError", ExitCode.ENVIRONMENT),
        ("nmoe.model.errors.CorruptCheckpointError", ExitCode.DATA),
        ("nmoe.model.errors.DiskSpaceError", ExitCode.ENVIRONMENT),
        ("nmoe.train.errors.NonFiniteError", ExitCode.DIVERGED),
        ("nmoe.train.errors.NotReproducibleError", ExitCode.ENVIRONMENT),
        ("nmoe.train.errors.IdentityMismatchError", ExitCode.USAGE),
        ("nmoe.train.errors.UnknownRunError", ExitCode.USAGE),
        ("nmoe.train.errors.RefusedCheckpointError", ExitCode.DATA),
        ("nmoe.train.errors.CheckpointWriteError", ExitCode.ENVIRONMENT),
        ("nmoe.model.errors.UnsupportedByFormatError", ExitCode.USAGE),
        ("nmoe.kernels.errors.UnsupportedArchError", ExitCode.ENVIRONMENT),
        ("torch.OutOfMemoryError", ExitCode.ENVIRONMENT),
    ],
)
def test_the_nearest_class_decides(name, code):
    module, _, attribute = name.rpartition(".")
    kind = getattr(importlib.import_module(module), attribute)
    assert exit_code_of(kind.__new__(kind)) is code


def test_errors_of_this_package_and_of_the_system():
    assert exit_code_of(ConfigError([])) is ExitCode.USAGE
    assert exit_code_of(CliError("x")) is ExitCode.USAGE
    assert exit_code_of(OSError(errno.ENOSPC, "full")) is ExitCode.ENVIRONMENT
    assert exit_code_of(FileNotFoundError(errno.ENOENT, "nothing")) is ExitCode.BUG
    assert exit_code_of(RuntimeError("x")) is ExitCode.BUG
