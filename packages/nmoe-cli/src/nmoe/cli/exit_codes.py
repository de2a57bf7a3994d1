"""Which exit code an error of any nmoe package ends `n` with, without importing that package."""

import errno

from nmoe.cli.errors import CliError, ExitCode

# By qualified name: an error can only have been raised if its package was imported, and --help imports none. The
# nearest class in the error's ancestry decides, so a package's base class speaks for what has no line of its own.
_CODES = {
    "nmoe.data.errors.DataError": ExitCode.DATA,
    "nmoe.data.errors.ArgumentError": ExitCode.USAGE,
    "nmoe.data.errors.UnknownTokenizerError": ExitCode.USAGE,
    "nmoe.data.errors.OutputExistsError": ExitCode.USAGE,
    "nmoe.data.errors.MixtureError": ExitCode.USAGE,
    "nmoe.data.errors.PlanError": ExitCode.USAGE,
    "nmoe.data.errors.TokenizerUnavailableError": ExitCode.ENVIRONMENT,
    "nmoe.data.errors.CorpusUnavailableError": ExitCode.ENVIRONMENT,
    "nmoe.data.errors.WriteError": ExitCode.ENVIRONMENT,
    "nmoe.data.errors.NetworkError": ExitCode.ENVIRONMENT,
    "nmoe.data.errors.WorkerDiedError": ExitCode.ENVIRONMENT,
    "nmoe.data.errors.PrepStateError": ExitCode.USAGE,
    "nmoe.data.errors.PrepRunningError": ExitCode.USAGE,
    "nmoe.model.errors.ModelError": ExitCode.DATA,
    "nmoe.model.errors.UnsupportedByFormatError": ExitCode.USAGE,
    "nmoe.model.errors.DiskSpaceError": ExitCode.ENVIRONMENT,
    "nmoe.model.errors.SamplingError": ExitCode.USAGE,
    "nmoe.model.errors.FolderExistsError": ExitCode.USAGE,
    "nmoe.train.errors.TrainError": ExitCode.USAGE,
    "nmoe.train.errors.NonFiniteError": ExitCode.DIVERGED,
    "nmoe.train.errors.NotReproducibleError": ExitCode.ENVIRONMENT,
    "nmoe.train.errors.PeerFaultError": ExitCode.PEER,
    "nmoe.train.errors.RefusedCheckpointError": ExitCode.DATA,
    "nmoe.train.errors.MissingCheckpointsError": ExitCode.DATA,
    "nmoe.train.errors.DamagedExperimentsError": ExitCode.DATA,
    "nmoe.train.errors.MetricsError": ExitCode.DATA,
    "nmoe.train.errors.CheckpointWriteError": ExitCode.ENVIRONMENT,
    "nmoe.train.errors.ExperimentsVersionError": ExitCode.ENVIRONMENT,
    "nmoe.eval.errors.EvalError": ExitCode.DATA,
    "nmoe.eval.errors.UnknownTaskError": ExitCode.USAGE,
    "nmoe.eval.errors.SandboxUnavailableError": ExitCode.ENVIRONMENT,
    "nmoe.eval.errors.RankError": ExitCode.PEER,
    "nmoe.model.folder_parts.MissingPartsError": ExitCode.PEER,
    "nmoe.model.folder_parts.NotPublishedError": ExitCode.PEER,
    "nmoe.model.folder_parts.PartFailedError": ExitCode.PEER,
    "nmoe.rdep.errors.RdepError": ExitCode.ENVIRONMENT,
    "nmoe.rdep.errors.PeerTimeoutError": ExitCode.PEER,
    "nmoe.rdep.errors.WorldError": ExitCode.PEER,
    "nmoe.kernels.errors.KernelError": ExitCode.ENVIRONMENT,
    "sqlite3.OperationalError": ExitCode.ENVIRONMENT,
    "torch.OutOfMemoryError": ExitCode.ENVIRONMENT,
}

_DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO})


def exit_code_of(error: BaseException) -> ExitCode:
    """The exit code that `error` stands for; `ExitCode.BUG` for one that nobody foresaw."""
    if isinstance(error, CliError):
        return error.exit_code
    for ancestor in type(error).__mro__:
        code = _CODES.get(f"{ancestor.__module__}.{ancestor.__qualname__}")
        if code is not None:
            return code
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        return ExitCode.ENVIRONMENT
    return ExitCode.BUG
