"""Layers that compute their forward again in the backward: the same bits, and only their inputs kept until then."""

from collections.abc import Collection

import pytest
import torch
from nmoe.model.feed_forward import MixtureOfExperts
from nmoe.model.schema import ModelConfig
from nmoe.model.transformer import Transformer
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NAMES = ["everything", "mla", "mla_swa_mtp", "sdpa", "sdpa_swa_mtp"]
"""Layer 0 is dense, the others have experts; with a window, layers 0 and 2 are local; then come MTP's modules."""


def samples(config: ModelConfig, count: int = 4, length: int = 7) -> torch.Tensor:
    return torch.randint(config.vocab_size, (count, length + 1), generator=torch.Generator().manual_seed(3))


def results(model: Transformer, recompute: Collection[int]) -> dict[str, torch.Tensor]:
    """All that a training step reads of two micro-batches' losses."""
    model.zero_grad()
    for _, router in model.routers():
        router.load.zero_()
    found: dict[str, torch.Tensor] = {}
    for i, micro_batch in enumerate(samples(model.config).split(2)):
        loss = model.training_loss(micro_batch, 28, recompute=recompute)
        loss.total.backward()
        found |= {f"loss/{i}": loss.total.detach(), f"next token/{i}": loss.next_token}
    found |= {f"gradient/{name}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found | {f"load/{name}": router.load.clone() for name, router in model.routers()}


def different(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    assert found.keys() == expected.keys()
    return [name for name in expected if not torch.equal(found[name], expected[name])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_the_bits_are_those_of_a_step_that_recomputes_nothing(tiny, build, name: str, dtype: torch.dtype) -> None:
    model = build(tiny(name), dtype=dtype)
    layers = range(model.config.n_layers + model.config.mtp_depth)
    expected = results(model, ())
    assert sum(key.startswith("load/") for key in expected) == len(layers) - 1
    for recompute in (layers, *({layer} for layer in layers)):
        assert different(results(model, recompute), expected) == [], f"with {recompute} recomputed"


def test_a_layer_that_counts_its_own_load_would_be_told_apart(tiny, build) -> None:
    model = build(tiny("mla"))
    expected = results(model, ())
    layer = model.layers[2].ffn
    right = layer.routed

    def counting(*arguments: object, **named: object) -> tuple[object, ...]:
        routing = arguments[2]
        layer.router.load += torch.bincount(routing.expert_TK.flatten(), minlength=len(layer.router.load))
        out_TD, load_E, other = right(*arguments, **named)
        return out_TD, torch.zeros_like(load_E), other

    layer.routed = counting
    assert different(results(model, ()), expected) == []
    assert different(results(model, {2}), expected) == ["load/layers.2"]


def test_the_chosen_layers_run_twice_and_no_others(tiny, build) -> None:
    model = build(tiny())
    runs: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, MixtureOfExperts):
            right = module.routed

            def counted(*arguments: object, right=right, name=name, **named: object) -> object:
                runs[name] = runs.get(name, 0) + 1
                return right(*arguments, **named)

            module.routed = counted
    model.training_loss(samples(model.config), 28, recompute=[1, 4]).total.backward()
    assert runs == {
        "layers.1.ffn": 2,
        "layers.2.ffn": 1,
        "layers.3.ffn": 1,
        "mtp.0.block.ffn": 2,
        "mtp.1.block.ffn": 1,
    }


def storages(tree: object) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class Living(TorchDispatchMode):
    """Storages that operators made while it was on; views, of parameters for instance, have none of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> object:
        out = func(*args, **(kwargs or {}))
        taken = {storage._cdata for storage in storages((args, kwargs))}
        for storage in storages(out):
            if storage._cdata not in taken:
                # A weak reference keeps the address, so that no other storage gets it.
                self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return out

    def nbytes(self) -> int:
        """Of those that are still there."""
        return sum(size for reference, size in self.made.values() if not reference.expired())


def kept(model: Transformer, sample: torch.Tensor, recompute: Collection[int]) -> tuple[int, int]:
    """Bytes that live between forward and backward, and those of them that autograd was given to save (parameters, and
    what was there before, left out)."""
    saved: dict[int, tuple[int, torch.UntypedStorage]] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = (storage.nbytes(), storage)
        return tensor

    with Living() as living, torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model.training_loss(sample, 28, recompute=recompute)
    given = sum(size for address, (size, _) in saved.items() if address in living.made)
    saved.clear()
    alive = living.nbytes()
    assert loss.total.requires_grad
    return alive, given


@pytest.mark.parametrize("name", NAMES)
def test_a_recomputed_layer_keeps_its_input_alone(tiny, build, name: str) -> None:
    """What is left with all layers recomputed: each one's input, and what embedding, norms, heads and the losses keep;
    the layers' own tensors would be many times that."""
    config = tiny(name)
    model, sample = build(config), samples(config, count=16, length=7)
    layers = config.n_layers + config.mtp_depth
    (every, every_given), (none, none_given) = kept(model, sample, range(layers)), kept(model, sample, ())
    state = 16 * 7 * config.dim * 8
    # Of a trunk layer its input, of an MTP module two; the last norm's two; of each head what its backward needs.
    inputs = (config.n_layers + 2 * config.mtp_depth + 2) * state
    heads = (1 + config.mtp_depth) * (state + 8 * config.vocab_size * config.dim)
    rest = (1 + layers) * 1024  # routers' loads, the tables of the rotary embedding, scalars
    assert every <= inputs + heads + rest
    assert every_given <= every
    assert none > 4 * every
    assert none_given > 4 * every_given


@pytest.mark.parametrize("name", ["everything", "sdpa_swa_mtp"])
def test_each_layer_saves_its_own_share(tiny, build, name: str) -> None:
    config = tiny(name)
    model, sample = build(config), samples(config, count=16)
    layers = range(config.n_layers + config.mtp_depth)
    none, every = (kept(model, sample, chosen)[0] for chosen in ((), layers))
    savings = [none - kept(model, sample, {layer})[0] for layer in layers]
    assert min(savings) > 4 * 16 * 5 * config.dim * 8
    assert sum(savings) == pytest.approx(none - every, rel=0.02)
