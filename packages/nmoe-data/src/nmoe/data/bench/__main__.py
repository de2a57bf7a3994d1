"""`python -m nmoe.data.bench loader` or `prep`; `--help` after it tells its options."""

import sys
from collections.abc import Sequence
from importlib import import_module

_COMMANDS = ("loader", "prep")


def main(arguments: Sequence[str]) -> int:
    """Runs one bench; its exit code, or 2 if there is none of that name."""
    name = arguments[0] if arguments else None
    if name not in _COMMANDS:
        print(f"usage: python -m nmoe.data.bench {{{','.join(_COMMANDS)}}} …", file=sys.stderr)
        return 2
    run = import_module(f"nmoe.data.bench.{name}").main
    return int(run(list(arguments[1:])))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
