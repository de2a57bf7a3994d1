"""Parameters in flat buffers: values kept, places aligned, equal matrices side by side, memory bounded."""

import weakref

import pytest
import torch
from nmoe.rdep.world import alone
from nmoe.train.flat import FlatParameters
from nmoe.train.layout import ALIGNMENT, side_by_side
from torch import nn

SHAPES = {"a": (3, 5), "b": (8, 8), "c": (7,), "d": (3, 5), "e": (2, 8, 8), "f": ()}


def flatten(ours, key_of=lambda name: "all"):
    return FlatParameters(ours, key_of, lambda key, shapes: side_by_side(shapes), alone("cpu"))


def parameters(dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_values_stay_and_become_views_of_one_buffer(dtype):
    ours = parameters(dtype)
    before = {name: p.detach().clone() for name, p in ours.items()}
    objects = {name: id(p) for name, p in ours.items()}
    (group,) = flatten(ours).groups
    for name, parameter in ours.items():
        assert id(parameter) == objects[name]
        assert torch.equal(parameter, before[name])
        assert parameter.untyped_storage().data_ptr() == group.weight.untyped_storage().data_ptr()
        assert (parameter.data_ptr() - group.weight.data_ptr()) % 128 == 0
    group.weight.zero_()
    assert not any(p.any() for p in ours.values())


def test_each_parameter_has_its_own_place_and_zeros_lie_between():
    (group,) = flatten(parameters()).groups
    owner = group.zeros(torch.int32)
    for number, name in enumerate(SHAPES, start=1):
        part = group.view(owner, name)
        assert not part.any(), "nobody else's"
        assert part.shape == SHAPES[name]
        part.fill_(number)
    assert not group.weight[owner == 0].any()
    assert group.weight.numel() % ALIGNMENT == 0


def test_groups_are_by_key_and_dtype():
    ours = parameters() | {"wide": nn.Parameter(torch.ones(4))}
    flat = flatten(ours, lambda name: name in "abc")
    found = {(group.key, group.dtype): set(group.shapes) for group in flat.groups}
    assert found == {
        (True, torch.bfloat16): {"a", "b", "c"},
        (False, torch.bfloat16): {"d", "e", "f"},
        (False, torch.float32): {"wide"},
    }


def test_equal_matrices_lie_side_by_side():
    """8 x 8 matrices fill whole pieces of 64 elements, so that nothing lies between."""
    (group,) = flatten(parameters()).groups
    assert group.layout.starts["e"] == group.layout.starts["b"] + 64


def test_the_parameters_own_memory_is_freed_as_it_goes():
    """When a group has been made, no storage of its parameters is left."""
    ours = parameters()
    storages = [weakref.ref(p.data.untyped_storage()) for p in ours.values()]
    old = {p.data_ptr() for p in ours.values()}
    flatten(ours)
    assert not old & {p.data_ptr() for p in ours.values()}
    assert all(storage() is None for storage in storages)
