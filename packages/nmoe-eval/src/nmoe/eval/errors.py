"""Errors of nmoe-eval."""


class EvalError(Exception):
    """Base of every error that nmoe-eval raises on purpose."""


class EmptyValidationError(EvalError):
    """There is nothing to score."""
