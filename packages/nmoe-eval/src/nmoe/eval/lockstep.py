"""What W ranks do side by side: each the same number of forward calls, and every answer on every rank.

The batches are those of the whole list and the same on every rank, whatever W is: rank r takes numbers r, r + W, … In
the last round, a rank may have none left; it then computes something small instead, since the others may need its
experts.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from nmoe.eval.errors import RankError
from nmoe.rdep.world import World

Batch = TypeVar("Batch")
Value = TypeVar("Value")

PATIENCE_S = 3600.0
"""How long a rank waits for the others' answers: without experts to share, ranks may drift far apart."""


def of_rank(batches: Sequence[Batch], world: World) -> Iterator[Batch | None]:
    """This rank's batch of each round; None where there is none for it. As many on every rank."""
    for first in range(0, len(batches), world.size):
        number = first + world.rank
        yield batches[number] if number < len(batches) else None


def gather(world: World, name: str, mine: Mapping[int, Any], count: int) -> list[Any]:
    """Every rank's values by their numbers, 0 to `count - 1`, on every rank.

    Args:
        world: the ranks.
        name: see `World.share`.
        mine: this rank's; values of JSON, which give back the same floats.
        count: of all ranks together.
    """
    if world.size == 1:
        return [mine[number] for number in range(count)]
    parts = world.share(name, json.dumps(list(mine.items())).encode(), PATIENCE_S)
    found = {number: value for part in parts for number, value in json.loads(part)}
    return [found[number] for number in range(count)]


def together(world: World, name: str, compute: Callable[[], Value]) -> Value:
    """What `compute` gives here, once it has ended well on every rank.

    It must not wait for other ranks: for what one of them alone may fail in, such as reading files.

    Raises:
        RankError: it failed on another rank; here, its own error is raised.
    """
    if world.size == 1:
        return compute()
    failure: Exception | None = None
    value: Value | None = None
    try:
        value = compute()
    except Exception as error:
        failure = error
    told = b"" if failure is None else f"{type(failure).__name__}: {failure}".encode(errors="replace")
    words = world.share(name, told, PATIENCE_S)
    if failure is not None:
        raise failure
    for rank, word in enumerate(words):
        if word:
            raise RankError(f"expected all ranks to end {name} well, found that rank {rank} did not: {word.decode()}")
    return value  # type: ignore[return-value]  # it is what compute gave
