"""Writes tensor folders without end, for test_checkpoint.py to kill. Usage: write_folders.py ROOT

For each line on standard input, a number, a child process is forked that writes the folders from that number on and
says `wrote N` after each. `begun PID` and `ended` frame its lines. Torch is imported once, for all children.
"""

import os
import sys
from pathlib import Path

import torch
from nmoe.model.checkpoint import write_folder


def content(number: int) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    """What folder `number` holds."""
    generator = torch.Generator().manual_seed(number)
    tensors = {f"t{index}": torch.rand(32, 1024, generator=generator) for index in range(8)}
    return tensors, {"state": {"number": number}}


def say(*words: object) -> None:
    """Writes a line that no kill cuts: in one system call."""
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def write_from(root: Path, number: int) -> None:
    while True:
        tensors, documents = content(number)
        write_folder(root / f"folder_{number:06}", tensors, documents, max_file_bytes=256 << 10)
        write_folder(root / "latest", tensors, documents, max_file_bytes=256 << 10, replace=True)
        say("wrote", number)
        number += 1


def main() -> None:
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            say("begun", os.getpid())
            write_from(Path(sys.argv[1]), int(line))
        os.waitpid(child, 0)
        say("ended")


if __name__ == "__main__":
    main()
