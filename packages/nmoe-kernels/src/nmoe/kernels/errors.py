"""Errors of nmoe-kernels."""


class KernelError(Exception):
    """Base of every error that nmoe-kernels raises on purpose."""


class UnsupportedArchError(KernelError):
    """The device cannot run the kernels that were asked for; the message names the remedy."""


class ShapeError(KernelError, ValueError):
    """A tensor's shape, dtype or device is not what the op takes."""
