"""`n` as a rank whose number 1 fails in the middle of training: at its third batch."""

import os

from nmoe.cli.app import main
from nmoe.data.loader import Loader

if os.environ["RANK"] == "1":
    sound, calls = Loader.batch, iter(range(1000))

    def batch(self, cursor, count):
        if cursor >= 2 * 8:  # of 8 samples a step
            raise RuntimeError("on purpose")
        return sound(self, cursor, count)

    Loader.batch = batch

if __name__ == "__main__":
    main()
