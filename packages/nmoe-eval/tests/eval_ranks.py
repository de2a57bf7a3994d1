"""A rank that evaluates. Usage: eval_ranks.py RANK SIZE PORT FOLDER

`FOLDER/bundle` is the bundle; what each rank found goes to `FOLDER/<SIZE>/<case>-<rank>.json`.
"""

import json
import runpy
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from nmoe.eval.engine import Engine
from nmoe.eval.errors import EvalError, RankError
from nmoe.eval.requests import ScoreRequest
from nmoe.eval.runner import evaluate, evaluate_suites
from nmoe.eval.sources import Sources, Suite
from nmoe.kernels.ops import select_ops
from nmoe.model.schema import ModelConfig
from nmoe.model.transformer import Transformer
from nmoe.rdep.schema import RdepConfig
from nmoe.rdep.transport import LocalTransport, open_transport
from nmoe.rdep.world import join_world

VOCAB, MAX_TOKENS = 211, 160
MODEL = ModelConfig(
    vocab_size=VOCAB, dim=16, n_layers=2, n_heads=2, init_std=0.3, inter_dim=24, moe_inter_dim=8, n_routed_experts=8,
    n_activated_experts=2, attn="mla", kv_lora_rank=6, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4,
)  # fmt: skip


def build(world, kind, calls):
    config = RdepConfig(transport="shm", capacity_factor=8.0, timeout_s=60.0)
    transport = LocalTransport(world)
    if kind == "experts" and world.size > 1:
        transport = open_transport(config, world, max_tokens=MAX_TOKENS, dtype=torch.float64)
    ops = select_ops("reference", "cpu")
    model = Transformer.build(MODEL, ops, transport, device="cpu", dtype=torch.float64, seed=1).eval()
    hidden = model.hidden

    def counted(token_BS, *args, **kwargs):
        calls.append(token_BS.numel())
        assert token_BS.numel() <= MAX_TOKENS
        return hidden(token_BS, *args, **kwargs)

    model.hidden = counted
    return model, transport


class Fails:
    """A task whose data cannot be encoded on one rank."""

    name, version, shots, data_sha256 = "fails", "1", 0, ""

    def __init__(self, rank):
        self.rank = rank

    def examples(self, tokenizer, *, limit, max_length):
        if self.rank == 1:
            raise EvalError("this rank's disk is gone")
        return []


def main():
    rank, size, port, folder = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    words = runpy.run_path(str(Path(__file__).with_name("conftest.py")))["Words"]
    torch.set_num_threads(1)
    world = join_world(rank=rank, size=size, address="127.0.0.1", port=port, device="cpu", timeout_s=60.0)

    def tell(case, value):
        (folder / str(size) / f"{case}-{rank}.json").write_text(json.dumps(value))

    sources = Sources((folder / "bundle",))
    for kind in ("copies", "experts"):
        calls = []
        model, transport = build(world, kind, calls)
        for case, limit in ((kind, None), (f"{kind}-one", 1)):
            calls.clear()
            found = evaluate(model, words(VOCAB), ["core"], sources=sources, max_length=80, max_tokens=MAX_TOKENS,
                             limit=limit, world=world)  # fmt: skip
            told = [[asdict(each) for each in task.examples] for task in found.tasks]
            rows = [asdict(row) for row in found.rows()]
            tell(case, {"examples": told, "rows": rows, "calls": len(calls), "sizes": calls})
        assert Engine(model, max_length=8, max_tokens=8, world=world).score([]) == []
        # One request: the other ranks have nothing to compute.
        (alone,) = Engine(model, max_length=8, max_tokens=8, world=world).score([ScoreRequest((1, 2), (3,))])
        tell(f"{kind}-request", alone.logprob)
        if size > 1:
            told = "this rank's disk is gone" if rank == 1 else "rank 1 did not: EvalError: this rank's disk is gone"
            with pytest.raises(EvalError if rank == 1 else RankError, match=told):
                evaluate_suites(model, words(VOCAB), [Suite((Fails(rank),))], max_length=8, max_tokens=8, world=world)
        transport.faults.check()
        world.barrier()
        transport.close()
    world.close()


if __name__ == "__main__":
    main()
