"""The prediction against what PyTorch really allocates: exactly for the state, within a factor for activations."""

import pytest
import torch
from nmoe.kernels.ops import select_ops
from nmoe.kernels.reference import cross_entropy
from nmoe.model.transformer import Transformer
from nmoe.rdep.slabs import slab_bytes
from nmoe.rdep.transport import LocalTransport
from nmoe.rdep.world import World, alone
from nmoe.train.gradients import Gradients
from nmoe.train.memory import predict_memory, routed_rows
from nmoe.train.optim import Optimizer, flatten
from nmoe.train.schema import TrainingConfig


def config(precision="bf16", optimizer="adamw", **model):
    shape = {
        "vocab_size": 500, "dim": 64, "n_layers": 3, "n_heads": 4, "kv_lora_rank": 32, "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8, "v_head_dim": 16, "inter_dim": 96, "moe_inter_dim": 32, "n_routed_experts": 8,
        "n_activated_experts": 2, "n_shared_experts": 1,
    }  # fmt: skip
    return TrainingConfig.model_validate(
        {
            "model": {**shape, **model},
            "train": {"steps": 1, "batch_size": 4, "micro_batch_size": 4, "seq_len": 128},
            "optim": {
                "lr_dense": 1e-3, "lr_router": 1e-3, "lr_expert": 1e-3,
                "dense_optimizer": optimizer, "expert_optimizer": optimizer,
            },
            "schedule": {"hold_tokens": 0},
            "runtime": {"device": "cpu", "precision": precision, "kernels": "reference"},
        }
    )  # fmt: skip


def build(settings):
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[settings.runtime.precision]
    ops = select_ops("reference", "cpu")
    model = Transformer.build(settings.model, ops, LocalTransport(), device="cpu", dtype=dtype, seed=0)
    return model, ops


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("mtp_depth", [0, 1])
def test_state_is_predicted_to_the_byte(precision, optimizer, mtp_depth):
    settings = config(precision, optimizer, mtp_depth=mtp_depth)
    model, ops = build(settings)
    parameters = dict(model.named_parameters())
    flat = flatten(parameters, settings.optim, alone("cpu"))
    pieces = Optimizer(flat, settings.optim, ops).state
    state = {piece.name: piece.tensor for of_parameter in pieces.values() for piece in of_parameter}
    gradients = {name: part for name, (part,) in Gradients(flat, ops).parts.items()}
    need = predict_memory(settings)
    residuals = sum(tensor.nbytes for name, tensor in state.items() if name.endswith("/residual"))
    assert need.parameters == sum(p.nbytes for p in parameters.values()) + residuals
    assert need.gradients == sum(tensor.nbytes for tensor in gradients.values())
    assert need.optimizer == sum(tensor.nbytes for tensor in state.values()) - residuals


@pytest.mark.parametrize("mtp_depth", [0, 1])
def test_activations_are_predicted_within_a_quarter(mtp_depth):
    """Counted are the storages that autograd holds between forward and backward, parameters left out."""
    settings = config("fp32", mtp_depth=mtp_depth)
    model, _ = build(settings)
    model.train()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held: dict[int, int] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        tokens = torch.randint(0, 500, (4, 129), generator=torch.Generator().manual_seed(0))
        loss = model.training_loss(tokens, 512)
    assert loss.total.requires_grad
    assert predict_memory(settings).activations == pytest.approx(sum(held.values()), rel=0.25)


def of_ranks(settings, ranks, **rdep):
    runtime = settings.runtime.model_copy(update={"world_size": ranks})
    return settings.model_copy(update={"runtime": runtime, "rdep": settings.rdep.model_copy(update=rdep)})


class Rank(World):
    """One of several that are not there: for what is allocated, not for what is computed."""

    def __init__(self, size):
        super().__init__(0, size, torch.device("cpu"))


class RankTransport(LocalTransport):
    def n_local(self, n_experts):
        return n_experts // self.world.size


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_state_of_several_ranks_is_predicted_but_for_what_fills_pieces_up(precision, optimizer):
    filled = 0.15 if optimizer == "muon" else 0.01  # three layers' and a projection, on four ranks
    settings = of_ranks(config(precision, optimizer, mtp_depth=1, dim=256, inter_dim=512, vocab_size=5000), 4)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    ops, transport = select_ops("reference", "cpu"), RankTransport(Rank(4))
    model = Transformer.build(settings.model, ops, transport, device="cpu", dtype=dtype, seed=0)
    flat = flatten(dict(model.named_parameters()), settings.optim, transport.world)
    optimizer_ = Optimizer(flat, settings.optim, ops)
    gradients = Gradients(flat, ops)
    held = {name: sum(p.tensor.nbytes for ps in optimizer_.state.values() for p in ps if p.name.endswith(name))
            for name in ("residual", "exp_avg", "exp_avg_sq", "momentum")}  # fmt: skip
    need = predict_memory(settings)
    assert need.parameters == pytest.approx(
        sum(g.weight.nbytes for g in flat.groups) + held.pop("residual"), rel=filled
    )
    assert need.optimizer == pytest.approx(sum(held.values()), rel=filled)
    taken = {p.main_grad.untyped_storage().data_ptr(): p.main_grad.untyped_storage().nbytes()
             for p in flat.parameters.values()}  # fmt: skip
    taken |= {sums.data_ptr(): sums.nbytes for sums in gradients.sums}
    assert need.gradients - (64 << 20) // 4 == pytest.approx(sum(taken.values()), rel=filled)


def test_ranks_share_experts_and_optimizer_state():
    one, shared = predict_memory(config()), predict_memory(of_ranks(config(), 4))
    assert shared.optimizer == pytest.approx(one.optimizer / 4)
    assert one.parameters / 4 < shared.parameters < one.parameters
    assert one.slabs == predict_memory(of_ranks(config(n_dense_layers=3), 4)).slabs == 0


@pytest.mark.parametrize(("ranks", "factor"), [(2, 1.0), (4, 1.5), (4, None), (8, 2.0)])
def test_rows_and_slabs_are_those_that_are_allocated(ranks, factor):
    """The module imports no torch, and so knows them by heart."""
    settings = of_ranks(config(mtp_depth=1, n_dense_layers=1), ranks, capacity_factor=factor)
    tokens = 4 * 128
    assert routed_rows(settings) == settings.rdep.row_capacity(tokens, 2, 8 // ranks, ranks)
    slab, counts = slab_bytes(ranks, tokens, 64, 2, torch.bfloat16), 256
    allocated = 3 * slab + slab + slab - ranks * tokens * 4 * 2
    assert predict_memory(settings).slabs == allocated - 5 * counts, "all but each slab's number of tokens"


@pytest.mark.parametrize("vocab", [500, 50_304, 201_088])
def test_the_heads_chunk_is_the_one_that_is_made(vocab):
    """The module imports no torch, and so knows the rule by heart."""
    settings = config(vocab_size=vocab, n_dense_layers=3)
    rows = cross_entropy._chunk_rows(4 * 128, vocab)
    assert predict_memory(settings).workspace == rows * vocab * (4 + 4 + 2) + 4 * vocab * 64
