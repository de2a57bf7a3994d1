"""Ranks that train. Usage: training_ranks.py FOLDER SIZE[,SIZE…] JOB…

For each size in turn, so many ranks make the jobs one after the other, each the function of that name below (`JOB` or
`JOB:argument`), all ranks together; what rank 0 found goes to `FOLDER/<SIZE>/<job>.json`. The first rank that fails
ends all, with its words. Ranks are forks of this process, which has imported what they need, which takes longer than
most jobs.
"""

import gc
import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from nmoe.model.transformer import Transformer
from nmoe.rdep.errors import CapacityError
from nmoe.rdep.transport import Transport
from nmoe.rdep.world import World, join_world
from nmoe.train import loop, optim
from nmoe.train.checkpointer import Checkpointer, load, newest_complete, step_of
from nmoe.train.errors import NonFiniteError, NotReproducibleError, PeerFaultError
from nmoe.train.loop import train
from nmoe.train.recorder import STEPS_LATE
from nmoe.train.run_folder import RunFolder
from nmoe.train.schema import TrainingConfig
from nmoe.train.state import TrainState

MODEL: dict[str, Any] = {
    "vocab_size": 61,
    "dim": 32,
    "n_layers": 3,
    "n_dense_layers": 3,
    "n_heads": 2,
    "init_std": 0.05,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "inter_dim": 48,
    "mtp_depth": 1,
}
EXPERTS = {
    "n_dense_layers": 1,
    "moe_inter_dim": 16,
    "n_routed_experts": 8,
    "n_activated_experts": 2,
    "n_shared_experts": 1,
    "seq_balance_loss": 1e-2,
    "aux_loss": 1e-2,
    "router_bias_update_rate": 1e-2,
}
ADAMW = {"lr_dense": 1e-2, "lr_router": 1e-2, "lr_expert": 1e-2, "eps": 1e-3}
MUON = {**ADAMW, "dense_optimizer": "muon", "expert_optimizer": "muon"}
RUNS: dict[str, dict[str, Any]] = {
    "adamw": {"optim": ADAMW},
    "clipped": {"optim": {**ADAMW, "clip_grad_norm": 0.05}},
    "experts": {"model": EXPERTS, "optim": ADAMW},
    "experts_muon": {"model": EXPERTS, "optim": MUON},
    "experts_bf16": {"model": EXPERTS, "optim": MUON, "runtime": {"precision": "bf16"}},
    "experts_recomputed": {"model": EXPERTS, "optim": ADAMW, "train": {"recompute_layers": "all"}},
    "experts_verified": {"model": EXPERTS, "optim": ADAMW, "train": {"verify_every": 1, "verify_times": 2}},
    "experts_documents": {"model": EXPERTS, "optim": ADAMW},
}
"""Sections that a run has of its own."""


def config_of(name: str, size: int, **more: Mapping[str, Any]) -> TrainingConfig:
    base: dict[str, dict[str, Any]] = {
        "model": MODEL,
        "rdep": {"timeout_s": 30.0, "capacity_factor": float(size)},
        "train": {"steps": 2, "batch_size": 8, "micro_batch_size": 1, "seq_len": 24},
        "optim": {},
        "schedule": {"warmup_steps": 2, "hold_tokens": 10**6},
        "checkpoint": {"keep": 10},
        "runtime": {"device": "cpu", "precision": "fp32", "kernels": "reference", "threads": 1, "world_size": size},
    }
    own = RUNS[name]
    sections = {key: {**keys, **own.get(key, {}), **more.get(key, {})} for key, keys in base.items()}
    return TrainingConfig.model_validate(sections)


class Tokens:
    """Samples that are a function of their index alone."""

    def __init__(self, length: int) -> None:
        self.length = length

    def batch(self, cursor: int, count: int) -> np.ndarray:
        rows = [np.random.default_rng(cursor + i).integers(0, 8, self.length + 1) for i in range(count)]
        return np.stack(rows).astype(np.int64)


class Documents:
    """A document ends with 0, which is no target: every rank has another number of targets."""

    def starts(self, sample_NS1: np.ndarray) -> np.ndarray:
        after = np.where(sample_NS1[:, :-1] == 0, np.arange(1, sample_NS1.shape[1]), 0)
        return np.maximum.accumulate(np.pad(after, ((0, 0), (1, 0)))[:, :-1], axis=1).astype(np.int32)

    def targets(self, sample_NS1: np.ndarray) -> np.ndarray:
        return np.where(sample_NS1[:, 1:] == 0, -100, sample_NS1[:, 1:])


@contextmanager
def when_taken(cursor: int | None, action: Callable[[], None]) -> Iterator[None]:
    """Does something on this rank when a step takes the samples at `cursor`; they may have been read long before."""
    original = loop.Batches

    class Noticed(original):  # type: ignore[misc, valid-type]
        def take(self, at: int) -> Any:
            if at == cursor:
                action()
            return super().take(at)

    loop.Batches = Noticed  # type: ignore[misc]
    try:
        yield
    finally:
        loop.Batches = original  # type: ignore[misc]


class Recorder:
    def __init__(self) -> None:
        self.steps: list[tuple[float, float]] = []

    def step(self, report: Any) -> None:
        self.steps.append((report.loss, report.grad_norm))

    def start(self, run: Any) -> None: ...
    def evaluation(self, step: int, values: Any) -> None: ...
    def checkpoint(self, step: int, path: Path) -> None: ...
    def message(self, text: str) -> None: ...
    def close(self) -> None: ...


class Ranks:
    """This rank, and where the runs are."""

    def __init__(self, world: World, folder: Path) -> None:
        self.world, self.folder = world, folder / str(world.size)
        self.states: list[TrainState] = []
        remember = self.states.append

        class Remembered(TrainState):
            def __init__(self, *args: Any) -> None:
                super().__init__(*args)
                remember(self)

        loop.TrainState = Remembered  # type: ignore[misc]

    def run(self, name: str, config: TrainingConfig, **options: Any) -> dict[str, Any]:
        run = RunFolder(self.folder, name)
        run.path.mkdir(parents=True, exist_ok=True)
        recorder = Recorder()
        outcome = train(
            config,
            run=run,
            batches=Tokens(config.train.seq_len),
            identity={},
            reporter=recorder,
            world=self.world,
            **options,
        )
        return {"status": outcome.status, "step": outcome.step, "signal": outcome.signal, "steps": recorder.steps}


def whole(ranks: Ranks, name: str) -> dict[str, Any]:
    """A run of two steps."""
    documents = Documents() if name == "experts_documents" else None
    return ranks.run(name, config_of(name, ranks.world.size), documents=documents)


def longer(ranks: Ranks, name: str) -> dict[str, Any]:
    """Four steps, with a checkpoint and an evaluation after each."""
    config = config_of(name, ranks.world.size, train={"steps": 4}, checkpoint={"every": 1})
    tokens = torch.arange(24).view(1, 24)

    def evaluate(model: Transformer) -> dict[str, float]:
        return {"val/loss": float(model.score(tokens, tokens))}

    return ranks.run(f"longer-{name}", config, evaluate=evaluate, evaluate_every=1)


def resumed(ranks: Ranks, name: str) -> dict[str, Any]:
    """From the second checkpoint of two ranks' `longer` run on; what was restored is saved again, too."""
    size = ranks.world.size
    source = load(RunFolder(ranks.folder.parent / "2", f"longer-{name}").checkpoints / "step_00000002")

    def save_again(step: int) -> None:
        state = ranks.states[-1]
        again = Checkpointer(ranks.folder / f"again-{name}", 1, world=ranks.world)
        again.save(step, state.pieces(), state.documents())
        again.wait()

    config = config_of(name, size, train={"steps": 2})
    ranks.run(f"restored-{name}", config, resume=source, at_end=lambda model: save_again(2))
    return ranks.run(f"resumed-{name}", config_of(name, size, train={"steps": 4}), resume=source)


def started(ranks: Ranks, name: str) -> dict[str, Any]:
    """Another run, from the weights of two ranks' `longer` run; it makes one step, of no size."""
    source = load(RunFolder(ranks.folder.parent / "2", f"longer-{name}").checkpoints / "step_00000002")
    frozen = {"lr_dense": 1e-30, "lr_router": 1e-30, "lr_expert": 1e-30}
    config = config_of(name, ranks.world.size, train={"steps": 1}, optim=frozen)
    return ranks.run(f"started-{name}", config, start_from=source)


def stopped(ranks: Ranks, name: str) -> dict[str, Any]:
    """The last rank gets a signal within step 3, when it takes its samples; figures are read a step late."""
    size = ranks.world.size
    STEPS_LATE["cpu"] = 1
    try:
        with when_taken(2 * 8 if ranks.world.rank == size - 1 else None, lambda: os.kill(os.getpid(), signal.SIGTERM)):
            found = ranks.run(f"stopped-{name}", config_of(name, size, train={"steps": 9}))
    finally:
        STEPS_LATE["cpu"] = 0
    steps = ranks.world.share(f"stopped {name}", str(found["step"]).encode())
    return {**found, "steps_of_ranks": [int(step) for step in steps]}


def faulty(ranks: Ranks, name: str) -> dict[str, Any]:
    """On the last rank more rows come than there is room for, while step 3 is prepared; figures are read at once."""
    size, opened = ranks.world.size, loop.open_transport
    transports: list[Transport] = []

    def open_transport(*args: Any, **keys: Any) -> Transport:
        transports.append(opened(*args, **keys))
        return transports[-1]

    def overflow() -> None:
        transports[-1].faults.report_overflow(10, 5)

    loop.open_transport = open_transport
    config = config_of(name, size, train={"steps": 9}, checkpoint={"every": 1})
    try:
        with when_taken(2 * 8 if ranks.world.rank == size - 1 else None, overflow):
            ranks.run(f"faulty-{name}", config)
    except (CapacityError, PeerFaultError) as error:
        told = f"{type(error).__name__}: {error}"
    finally:
        loop.open_transport = opened
    saved = newest_complete(RunFolder(ranks.folder, f"faulty-{name}").checkpoints)
    shared = ranks.world.share(f"faulty {name}", told.encode())
    return {"ranks": [words.decode() for words in shared], "saved": step_of(saved)}


def refused(ranks: Ranks, what: str) -> dict[str, Any]:
    """Sample 21 (of step 3) gives a loss or a gradient that is not finite, or other bits when it is verified; figures
    are read a step late."""
    poison = torch.from_numpy(Tokens(24).batch(21, 1))
    original, seen = Transformer.training_loss, []

    def poisoned(self: Transformer, sample: torch.Tensor, n_tokens: int, **options: Any) -> Any:
        loss = original(self, sample, n_tokens, **options)
        if not torch.equal(sample, poison):
            return loss
        if what == "bits":
            seen.append(None)
            return loss._replace(total=loss.total + (len(seen) - 1) * 1e-4 * self.norm.weight[0])
        if what == "loss":
            return loss._replace(total=loss.total * float("nan"), next_token=loss.next_token * float("nan"))
        weight = self.norm.weight
        return loss._replace(total=loss.total + (weight - weight.detach()).abs().sum().sqrt())

    Transformer.training_loss = poisoned  # type: ignore[method-assign]
    STEPS_LATE["cpu"] = 1
    verified = {"verify_every": 3} if what == "bits" else {}
    config = config_of("experts_bf16", ranks.world.size, train={"steps": 9, **verified}, checkpoint={"every": 2})
    try:
        ranks.run(f"refused-{what}", config)
    except (NonFiniteError, NotReproducibleError) as error:
        message = str(error)
    finally:
        Transformer.training_loss = original  # type: ignore[method-assign]
        STEPS_LATE["cpu"] = 0
    saved = load(newest_complete(RunFolder(ranks.folder, f"refused-{what}").checkpoints))
    pieces = [piece for piece in ranks.states[-1].pieces() if not piece.name.startswith("rng/")]
    same = all(
        torch.equal(
            saved.read_range(piece.name, piece.start, piece.stop).view(torch.uint8),
            piece.tensor.detach().reshape(-1).view(torch.uint8),
        )
        for piece in pieces
    )
    told = json.dumps({"message": message, "same": same}).encode()
    return {
        "saved": saved.document("progress")["step"],
        "ranks": [json.loads(told) for told in ranks.world.share(f"refused {what}", told)],
    }


def use_small_chunks(elements: int) -> None:
    """Of which these models, far smaller than a MiB, have many; the schema's bound is in whole MiB."""

    def bounded(lay_out: Any, *args: Any, chunk_size: int, **keys: Any) -> Any:
        return lay_out(*args, chunk_size=elements, **keys)

    optim.cut_anywhere = partial(bounded, optim.cut_anywhere)  # type: ignore[assignment]
    optim.whole_parameters = partial(bounded, optim.whole_parameters)  # type: ignore[assignment]


def be_rank(rank: int, size: int, port: int, folder: Path, jobs: list[str]) -> None:
    world = join_world(rank=rank, size=size, address="127.0.0.1", port=port, device="cpu", timeout_s=60)
    ranks = Ranks(world, folder)
    for job in jobs:
        name, _, argument = job.partition(":")
        found = globals()[name](ranks, argument)
        if rank == 0:
            (ranks.folder / f"{job}.json").write_text(json.dumps(found))
    world.close()


def fork_rank(log: Path, *arguments: Any) -> int:
    """A process that is a rank, writes to `log`, and ends with 1 if it fails."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        with log.open("wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        be_rank(*arguments)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def import_what_is_imported_late() -> None:
    import_module("torch._dynamo")  # by the first call of torch.utils.checkpoint
    pa.table({"step": [1]})  # imports pandas, where there is one


def main() -> None:
    import_what_is_imported_late()
    use_small_chunks(3000)
    gc.freeze()  # what was imported lives as long as the ranks
    folder, jobs = Path(sys.argv[1]), sys.argv[3:]
    for size in map(int, sys.argv[2].split(",")):
        (folder / str(size)).mkdir()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        logs = [folder / f"{size}-{rank}.log" for rank in range(size)]
        ranks = {fork_rank(log, rank, size, port, folder, jobs): rank for rank, log in enumerate(logs)}
        while ranks:
            pid, status = os.wait()
            rank = ranks.pop(pid)
            if status:
                for other in ranks:
                    os.kill(other, signal.SIGKILL)
                sys.exit(f"rank {rank} of {size} ended with status {status}:\n{logs[rank].read_text()}")


if __name__ == "__main__":
    main()
