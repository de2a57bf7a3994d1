"""`n` as a rank whose number 1 fails in an evaluation where the others compute, and wait for its experts."""

import os

from nmoe.cli.app import main
from nmoe.eval.engine import Engine

if os.environ["RANK"] == "1":

    def forward(self, batch):
        raise RuntimeError("on purpose")

    Engine._forward = forward

if __name__ == "__main__":
    main()
