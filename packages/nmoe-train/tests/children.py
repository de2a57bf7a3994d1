"""Processes for tests to kill. Usage: children.py MODULE…

Each line on standard input, `NAME FOLDER N`, forks a child that runs the function NAME below in FOLDER, which says
`did N` when it has done something. `begun PID` and `ended` frame its lines. MODULEs are imported once, before.
"""

import os
import signal
import sys
from importlib import import_module
from pathlib import Path


def say(*words: object) -> None:
    """Writes a line that no kill cuts: in one system call."""
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def checkpoints(folder: Path, step: int) -> None:
    """Saves the steps from `step` on, without end; says that one is done when the next has begun."""
    import torch
    from nmoe.train.checkpointer import Checkpointer

    checkpointer = Checkpointer(folder, keep=2, keep_every=10)
    checkpointer.drop_after(step - 1)
    state = {name: torch.empty_like(tensor) for name, tensor in state_of(0)[0].items()}
    while True:
        tensors, documents = state_of(step)
        for name, tensor in tensors.items():
            # In place, as an optimizer does it: the write of the last checkpoint may still be under way.
            state[name].copy_(tensor)
        checkpointer.save(step, state, documents)
        say("did", step - 1)
        step += 1


def state_of(step: int) -> tuple[dict, dict]:
    """What `checkpoints` saves at a step."""
    import torch

    generator = torch.Generator().manual_seed(step)
    tensors = {f"t{index}": torch.rand(16, 1024, generator=generator) for index in range(8)}
    return tensors, {"progress": {"step": step}}


def unfinished(folder: Path, step: int) -> None:
    """Begins to write a checkpoint, and fails at once."""
    from nmoe.train.checkpointer import Checkpointer

    Checkpointer(folder, keep=2).save(step, *state_of(step))
    raise SystemExit(1)


def metrics(folder: Path, step: int) -> None:
    """Goes on from `step`, without end."""
    from nmoe.train.metrics import MetricsWriter

    writer = MetricsWriter(folder, compact_every=4)
    writer.drop_after(step - 1)
    while True:
        values = metrics_of(step)
        late = {tag: values.pop(tag) for tag in ["val/loss"] if tag in values}
        writer.write(step, values)
        if late:
            writer.write(step, late)
        say("did", step)
        step += 1


def metrics_of(step: int) -> dict[str, float]:
    """What `metrics` writes for a step; the validation loss in a second write."""
    values = {f"tag/{index}": step + index / 8 for index in range(step % 4 + 1)}
    return values | ({"val/loss": float(step)} if step % 3 == 0 else {})


def experiments(folder: Path, step: int) -> None:
    """Continues one run from `step`, without end."""
    from nmoe.train.experiments import Experiments

    database = Experiments(folder / "experiments.db")
    database.start("run", experiment="e", config="", steps=1000, step=step)
    while True:
        database.update("run", step=step, train_loss=float(step))
        say("did", step)
        step += 1


def many_runs(folder: Path, number: int) -> None:
    """Makes `number` processes that record a run each in one database, all at once, and ends with them."""
    from nmoe.train.experiments import Experiments

    begin, go = os.pipe()
    for index in range(number):
        if os.fork() == 0:
            os.close(go)
            os.read(begin, 1)
            with Experiments(folder / "experiments.db") as database:
                database.start(f"run{index}", experiment=f"e{index % 2}", config=f"c{index}", steps=100)
                for step in range(10):
                    database.update(f"run{index}", step=step, val_loss=index + 0.25)
                database.finish(f"run{index}", "finished", f"m{index}")
            os._exit(0)
    os.close(go)
    statuses = [os.wait()[1] for _ in range(number)]
    say("did", statuses.count(0))
    os._exit(0)


def hold_lock(folder: Path, number: int) -> None:
    from nmoe.train.run_folder import RunFolder

    with RunFolder(folder, f"run{number}").lock():
        say("did", number)
        signal.pause()


def create_run(folder: Path, number: int) -> None:
    """Makes `number` processes that create the same run at once; says which could."""
    from nmoe.train.errors import RunExistsError
    from nmoe.train.run_folder import RunFolder

    begin, go = os.pipe()
    for index in range(number):
        if os.fork() == 0:
            os.close(go)
            os.read(begin, 1)
            try:
                RunFolder(folder, "run").create(f"index = {index}\n", {"index": index})
            except RunExistsError:
                os._exit(0)
            say("did", index)
            os._exit(0)
    os.close(go)
    for _ in range(number):
        os.wait()
    os._exit(0)


def main() -> None:
    for module in sys.argv[1:]:
        import_module(module)
    if "pyarrow" in sys.modules:
        # The first array imports pandas, where it is installed: better once here than in every child.
        sys.modules["pyarrow"].array([0])
    for line in sys.stdin:
        name, folder, number = line.split()
        child = os.fork()
        if child == 0:
            say("begun", os.getpid())
            globals()[name](Path(folder), int(number))
        os.waitpid(child, 0)
        say("ended")


if __name__ == "__main__":
    main()
