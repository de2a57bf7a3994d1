"""The prediction against what PyTorch really allocates: exactly for the state, within a factor for activations."""

import pytest
import torch
from nmoe.kernels.ops import select_ops
from nmoe.kernels.reference import cross_entropy
from nmoe.model.transformer import Transformer
from nmoe.rdep.transport import LocalTransport
from nmoe.train.gradients import Gradients
from nmoe.train.memory import predict_memory
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
    flat = flatten(parameters, settings.optim)
    state = Optimizer(flat, settings.optim, ops).state
    gradients = Gradients(flat, ops).by_name
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


def test_ranks_share_experts_and_optimizer_state():
    alone = config()
    four = alone.model_copy(update={"runtime": alone.runtime.model_copy(update={"world_size": 4})})
    one, shared = predict_memory(alone), predict_memory(four)
    assert shared.gradients == pytest.approx(one.gradients / 4)
    assert shared.optimizer == pytest.approx(one.optimizer / 4)
    assert one.parameters / 4 < shared.parameters < one.parameters


@pytest.mark.parametrize("vocab", [500, 50_304, 201_088])
def test_the_heads_chunk_is_the_one_that_is_made(vocab):
    """The module imports no torch, and so knows the rule by heart."""
    settings = config(vocab_size=vocab, n_dense_layers=3)
    rows = cross_entropy._chunk_rows(4 * 128, vocab)
    assert predict_memory(settings).workspace == rows * vocab * (4 + 4 + 2) + 4 * vocab * 64
