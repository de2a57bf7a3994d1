"""Errors of nmoe-rdep."""


class RdepError(Exception):
    """Base of every error that nmoe-rdep raises on purpose."""


class TransportUnavailableError(RdepError):
    """The transport that was asked for cannot serve this run; the message names the remedy."""


class WorldError(RdepError):
    """The ranks cannot meet, or a collective failed or was called with tensors that it cannot take."""


class SymmetricMemoryError(RdepError):
    """Memory that every rank can write to cannot be had; the message names the remedy."""


class PeerTimeoutError(RdepError):
    """A rank did not come in time.

    Args:
        rank: the one that is missing.
        phase: what it was waited for, as in "dispatch".
        timeout_s: how long, in seconds.
    """

    def __init__(self, rank: int, phase: str, timeout_s: float) -> None:
        super().__init__(
            f"expected rank {rank} to reach '{phase}' within {timeout_s:g} s, found no sign of it: see what rank "
            f"{rank} said last; if it is only slow, raise rdep.timeout_s"
        )
        self.rank, self.phase, self.timeout_s = rank, phase, timeout_s


class CapacityError(RdepError):
    """More rows were routed to a rank than its buffers hold.

    Args:
        needed: rows that were routed to the rank.
        capacity: rows that there is room for.
        needed_factor: the least rdep.capacity_factor, in hundredths, that holds `needed` rows.
    """

    def __init__(self, needed: int, capacity: int, needed_factor: float) -> None:
        super().__init__(
            f"expected at most {capacity} rows for this rank's experts, found {needed}: set rdep.capacity_factor to "
            f"{needed_factor:g} or more (other ranks and later steps may need more), or leave it out: there is then "
            "room for any routing"
        )
        self.needed, self.capacity, self.needed_factor = needed, capacity, needed_factor
