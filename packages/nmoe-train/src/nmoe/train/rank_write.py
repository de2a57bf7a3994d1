"""One checkpoint that all ranks write together, as one of them sees it. See `nmoe.model.folder_parts`."""

import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from nmoe.model.errors import CheckpointError
from nmoe.model.folder_json import encode_documents
from nmoe.model.folder_parts import (
    PartFailedError,
    abandon_folder,
    await_end,
    begin_folder,
    complete_folder,
    leave_failure,
    plan_part,
    write_part,
)
from nmoe.model.folder_place import is_alive, space_needed
from nmoe.model.tensor_pieces import Run, TensorPiece, join_pieces
from nmoe.rdep.world import World


@dataclass(frozen=True)
class RankWrite:
    """What the ranks agreed to write. Made by `agree`; then `write` it, or else `fail`."""

    path: Path
    """The checkpoint's place."""
    temporary: Path
    """Where it is written."""
    runs: Sequence[Run]
    """What this rank writes."""
    texts: Mapping[str, bytes]
    """The documents' files, which rank 0 writes."""
    processes: Sequence[tuple[str, int]]
    """Every rank's host and process number."""
    rank: int
    """This one."""
    timeout_s: float
    """How long rank 0 waits for the others once its own part is written."""

    @classmethod
    def agree(
        cls,
        world: World,
        name: str,
        path: Path,
        pieces: Iterable[TensorPiece],
        documents: Mapping[str, Any],
        timeout_s: float,
    ) -> "RankWrite":
        """Finds out that every rank can write, and makes the temporary folder. A collective: it raises on all or none.

        On return, every rank has called it: nothing of an earlier write is under way on any.

        Raises:
            nmoe.model.errors.CheckpointError: the format cannot hold an entry, or the disk has no room; of another
                rank, PartFailedError.
        """
        refusal: CheckpointError | None = None
        runs: list[Run] = []
        texts: dict[str, bytes] = {}
        need = 0
        try:
            runs, texts = join_pieces(pieces), encode_documents(documents)
            need = space_needed(plan_part(world.rank, runs), texts)
        except CheckpointError as error:
            refusal = error
        offer = {"host": platform.node(), "pid": os.getpid(), "need": need, "refusal": _told(refusal)}
        # A rank whose part of the last checkpoint failed comes while others still write theirs.
        offered = world.share(f"{name}/part", json.dumps(offer).encode(), 2 * timeout_s)
        offers = [json.loads(each) for each in offered]
        refusals = {rank: each["refusal"] for rank, each in enumerate(offers) if each["refusal"] is not None}
        if refusals:
            raise refusal or PartFailedError(path, refusals)

        temporary = None
        if world.rank == 0:
            try:
                temporary = begin_folder(path, sum(each["need"] for each in offers))
            except CheckpointError as error:
                refusal = error
            except OSError as error:
                refusal = PartFailedError(path, {0: f"{type(error).__name__}: {error}"})
        answer = {"temporary": temporary and temporary.name, "refusal": _told(refusal)}
        answer = json.loads(world.share(f"{name}/folder", json.dumps(answer).encode())[0])
        if answer["refusal"] is not None:
            raise refusal or PartFailedError(path, {0: answer["refusal"]})
        processes = [(each["host"], each["pid"]) for each in offers]
        return cls(path, path.with_name(answer["temporary"]), runs, texts, processes, world.rank, timeout_s)

    def write(self, snapshot: Mapping[str, torch.Tensor]) -> None:
        """Writes this rank's part, and returns once all parts have become the checkpoint. Calls no collective.

        Args:
            snapshot: The elements of `runs` by their keys, on the CPU.

        Raises:
            MissingPartsError, PartFailedError: on rank 0: another rank's part will not come.
            NotPublishedError: on the others: rank 0 could not make the checkpoint.
            nmoe.model.errors.CheckpointError, OSError: this rank could not write.
        """
        try:
            write_part(self.temporary, self.path, self.rank, self.runs, snapshot)
            if self.rank == 0:
                n_ranks = len(self.processes)
                complete_folder(self.temporary, self.path, n_ranks, self.texts, self.timeout_s, self._is_dead)
        except BaseException as error:
            if self.rank > 0 and not self.temporary.exists():
                self._await_end()  # rank 0 gave up meanwhile, and says why
            self.fail(error)
            raise
        if self.rank > 0:
            self._await_end()

    def fail(self, error: BaseException) -> None:
        """Tells the other ranks that this one's part will not come."""
        if self.rank == 0:
            abandon_folder(self.temporary, self.path, error)
        else:
            leave_failure(self.temporary, self.rank, error)

    def _await_end(self) -> None:
        # Rank 0 may be done with its own part later, and then waits itself.
        await_end(self.temporary, self.path, 2 * self.timeout_s, self._is_dead)

    def _is_dead(self, rank: int) -> bool:
        host, pid = self.processes[rank]
        return host == platform.node() and not is_alive(pid)


def _told(refusal: Exception | None) -> str | None:
    return None if refusal is None else str(refusal)
