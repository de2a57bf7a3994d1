"""A rank for tests of the launcher: `python rank_script.py FOLDER RULE…`, where a rule is `RANK:ACTION`.

Each rank writes its number to `FOLDER/started` and stays until it is told to end, unless a rule is for it. Actions run
in their order: `say=TEXT` and `error=TEXT` print, `sleep=SECONDS`, `raise`, `exit=CODE`, `kill=SIGNAL` on itself,
`deaf` ignores SIGTERM, `orderly` ends with 128 + the signal that it gets, `peers=N` waits until N ranks have started.
"""

import os
import signal
import sys
import time
from pathlib import Path

from nmoe.cli.place import LIFELINE, end_with_launcher


def act(folder: Path, action: str) -> None:
    name, _, value = action.partition("=")
    match name:
        case "say":
            print(value, flush=True)
        case "error":
            print(value, file=sys.stderr, flush=True)
        case "sleep":
            time.sleep(float(value))
        case "raise":
            raise RuntimeError("on purpose")
        case "exit":
            sys.exit(int(value))
        case "kill":
            os.kill(os.getpid(), signal.Signals[value])
        case "deaf":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        case "orderly":
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda number, _: sys.exit(128 + number))
        case "peers":
            while len((folder / "started").read_text().split()) < int(value):
                time.sleep(0.01)


def main() -> None:
    folder, rank = Path(sys.argv[1]), os.environ["RANK"]
    end_with_launcher(int(os.environ[LIFELINE]))
    actions = [rule.partition(":")[2] for rule in sys.argv[2:] if rule.partition(":")[0] in (rank, "*")]
    for action in [one for one in actions if one in ("deaf", "orderly")]:
        act(folder, action)
    with open(folder / "started", "a") as file:
        file.write(f"{rank}:{os.getpid()}\n")
    for action in actions:
        act(folder, action)
    if not any(action.startswith("exit") for action in actions):
        time.sleep(60)


if __name__ == "__main__":
    main()
