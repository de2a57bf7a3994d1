"""Numbers as a person reads and writes them."""

from decimal import Decimal

_COUNTS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
_DECIMAL = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def format_count(value: float) -> str:
    """Parameters, tokens: three digits and a letter (24.1k, 7.34B); whole and plain under a thousand."""
    for bound, letter in _COUNTS:
        if value >= bound:
            return _three_digits(value / bound) + letter
    return f"{value:.0f}"


def format_flops(value: float) -> str:
    """Three digits and a unit: 9.21 GFLOP."""
    for bound, letter in _DECIMAL:
        if value >= bound:
            return f"{_three_digits(value / bound)} {letter}FLOP"
    return f"{value:.0f} FLOP"


def format_bytes(value: float) -> str:
    """GiB from one GiB on, else MiB from one MiB on, else KiB."""
    for power, unit in ((30, "GiB"), (20, "MiB")):
        if value >= 2**power:
            return f"{value / 2**power:.1f} {unit}"
    return f"{value / 2**10:.1f} KiB"


def format_duration(seconds: float) -> str:
    """`m:ss`, `h:mm:ss`, or days and hours."""
    total = max(0, round(seconds))
    days, hours, minutes, rest = total // 86400, total // 3600 % 24, total // 60 % 60, total % 60
    if days:
        return f"{days}d {hours}h"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def parse_count(text: str) -> int:
    """A whole number as a person writes it: 5000, 5_000, 100k, 1.5M, 2B, 3T. Raises ValueError for anything else."""
    letter = text[-1:].upper()
    scale = next((bound for bound, name in _COUNTS if name.upper() == letter), None)
    number = Decimal(text[:-1] if scale else text) * int(scale or 1)
    if not number.is_finite() or number != int(number) or number < 0:
        raise ValueError(text)
    return int(number)
