"""One step on a GPU, in CUDA graphs: what `ok` keeps, and what the accumulators say after a replay."""

from contextlib import nullcontext

import pytest
import torch
from nmoe.kernels.arch import NATIVE_ARCHES, detect_arch
from nmoe.kernels.ops import select_ops
from nmoe.model.transformer import Transformer
from nmoe.rdep.transport import LocalTransport
from nmoe.rdep.world import alone
from nmoe.train.batches import StepBatch
from nmoe.train.gradients import Gradients
from nmoe.train.optim import Optimizer, flatten
from nmoe.train.schema import TrainingConfig
from nmoe.train.step import TrainStep

pytestmark = pytest.mark.gpu

CONFIG = {
    "model": {
        "vocab_size": 64,
        "dim": 64,
        "n_layers": 2,
        "n_dense_layers": 1,
        "n_heads": 1,
        "attn": "sdpa",
        "head_dim": 64,
        "inter_dim": 64,
        "moe_inter_dim": 64,
        "n_routed_experts": 4,
        "n_activated_experts": 2,
        "init_std": 0.05,
    },
    "train": {"steps": 9, "batch_size": 4, "micro_batch_size": 2, "seq_len": 64},
    "optim": {"lr_dense": 1e-2, "lr_router": 1e-2, "lr_expert": 1e-2, "expert_optimizer": "muon"},
    "schedule": {"hold_tokens": 10_000},
    "runtime": {"device": "cuda", "precision": "bf16", "kernels": "native"},
}


@pytest.fixture(autouse=True)
def _own_stream():
    if not torch.cuda.is_available() or detect_arch("cuda") not in NATIVE_ARCHES:
        pytest.skip(f"needs a GPU of {', '.join(NATIVE_ARCHES)}")
    with torch.cuda.stream(torch.cuda.Stream()):
        yield
    torch.cuda.synchronize()


@pytest.fixture(params=[True, False], ids=["graph", "eager"])
def step(request):
    return make_step(graph=request.param)


def make_step(*, graph: bool, **train: int) -> TrainStep:
    config = TrainingConfig.model_validate({**CONFIG, "train": {**CONFIG["train"], **train}})
    ops = select_ops("native", "cuda")
    transport = LocalTransport(alone("cuda"))
    model = Transformer.build(config.model, ops, transport, device="cuda", dtype=torch.bfloat16, seed=0)
    flat = flatten(dict(model.named_parameters()), config.optim, transport.world)
    gradients, optimizer = Gradients(flat, ops), Optimizer(flat, config.optim, ops)
    return TrainStep(model.train(), gradients, optimizer, config, transport, graph=graph)


def launch(step: TrainStep, number: int):
    sample = torch.randint(64, (4, 65), generator=torch.Generator().manual_seed(number))
    return step.launch(number, 4 * (number - 1), StepBatch(sample.cuda()), nullcontext)


def state_of(step: TrainStep) -> dict[str, torch.Tensor]:
    pieces = [*step.model.pieces(), *(piece for pieces in step.optimizer.state.values() for piece in pieces)]
    return {piece.name: piece.tensor.clone().view(torch.uint8) for piece in pieces}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def test_nothing_changes_from_a_bad_step_on(step):
    """Of a gradient that is not finite, in a tensor that is named; the steps after it are good in themselves."""
    factor = torch.ones((), device="cuda", dtype=torch.bfloat16)
    step.model.embed.weight.register_hook(lambda grad: grad * factor)
    for number in (1, 2, 3):
        assert all(map(torch.isfinite, map(torch.tensor, launch(step, number).wait().losses[0])))
    before = state_of(step)
    factor.fill_(float("inf"))
    bad = launch(step, 4)
    factor.fill_(1.0)
    after = [launch(step, number) for number in (5, 6)]
    assert not torch.isfinite(torch.tensor(bad.wait().grad_norm))
    assert all(torch.isfinite(torch.tensor(good.wait().grad_norm)) for good in after)
    assert same(state_of(step), before), "weights, residuals, moments, momentum and biases"
    factor.fill_(float("inf"))
    assert step.not_finite(bad) == ["embed.weight"]


def test_good_steps_change_everything_but_unused_parts(step):
    before = state_of(step)
    for number in (1, 2, 3):
        launch(step, number)
    after = state_of(step)
    assert [name for name in before if torch.equal(before[name], after[name])] == []


@pytest.mark.parametrize("graph", [True, False])
def test_verified_steps_leave_the_same_state(graph):
    """From the first one on: of an eager step, of the one that is captured, and of a replay."""
    plain, verified = make_step(graph=graph), make_step(graph=graph, verify_every=1, verify_times=2)
    for number in (1, 2, 3, 4):
        norms = [launch(step, number).wait().grad_norm for step in (plain, verified)]
        assert norms[0] == norms[1] > 0
    assert same(state_of(plain), state_of(verified))


def test_accumulators_hold_the_last_step(step):
    norms = [launch(step, number).wait().grad_norm for number in (1, 2, 3)]
    assert float(step.gradients.norm()) == pytest.approx(norms[-1], rel=1e-6)
    assert not step.gradients.not_finite()


def test_documents_and_targets_of_each_step_reach_its_graphs():
    """Replays see what eager steps see: every step has documents, targets and a number of targets of its own."""
    losses = {}
    for graph in (False, True):
        step, losses[graph] = make_step(graph=graph), []
        for number in range(1, 6):
            draw = torch.Generator().manual_seed(number)
            sample = torch.randint(64, (4, 65), generator=draw)
            ends = torch.rand(4, 64, generator=draw) < 0.02 * number
            starts = torch.where(ends, torch.arange(64), 0).cummax(1).values.int()
            targets = torch.where(torch.rand(4, 64, generator=draw) < 0.1 * number, -100, sample[:, 1:])
            batch = StepBatch(sample.cuda(), starts.cuda(), targets.cuda(), int((targets >= 0).sum()))
            losses[graph].append(step.launch(number, 0, batch, nullcontext).wait().losses)
    assert losses[True] == losses[False]
    assert len(set(losses[True])) == 5
