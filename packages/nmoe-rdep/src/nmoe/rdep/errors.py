"""Errors of nmoe-rdep."""


class RdepError(Exception):
    """Base of every error that nmoe-rdep raises on purpose."""


class TransportUnavailableError(RdepError):
    """The transport that was asked for cannot serve this run; the message names the remedy."""
