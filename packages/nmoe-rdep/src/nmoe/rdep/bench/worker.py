"""One rank of a measurement. Usage: worker.py TOKENS RESULT, with RANK, WORLD_SIZE and MASTER_* in the environment."""

import json
import os
import sys
from pathlib import Path

from nmoe.rdep.bench.exchange import measure_exchange
from nmoe.rdep.bench.layer import SHAPES, measure_layer
from nmoe.rdep.world import join_world


def main() -> None:
    """Measures all, the same on every rank; rank 0 writes."""
    tokens, result = sys.argv[1:]
    rank = int(os.environ["RANK"])
    world = join_world(
        rank=rank,
        size=int(os.environ["WORLD_SIZE"]),
        address=os.environ["MASTER_ADDR"],
        port=int(os.environ["MASTER_PORT"]),
        device=f"cuda:{rank}",
        timeout_s=120.0,
    )
    exchange = [] if world.size == 1 else [measure_exchange(world, int(n)) for n in tokens.split(",")]
    layers = {name: measure_layer(world, *shape) for name, shape in SHAPES.items()}
    if rank == 0:
        Path(result).write_text(json.dumps({"exchange": exchange, "layers": layers}))
    world.close()


if __name__ == "__main__":
    main()
