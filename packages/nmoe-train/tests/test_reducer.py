"""The sums over ranks, here of one: when a chunk is summed, and that nothing old is."""

import pytest
import torch
from nmoe.rdep.world import alone
from nmoe.train.flat import FlatParameters
from nmoe.train.layout import ALIGNMENT, Chunk, Layout
from nmoe.train.reducer import Reducer
from torch import nn

NAMES = ("first", "second", "third")


class Written(torch.autograd.Function):
    """As ops with hand-derived backwards: they give autograd no gradient, and may have written one themselves."""

    @staticmethod
    def forward(ctx, x, parameter, value):
        ctx.parameter, ctx.value = parameter, value
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        if ctx.value is not None:
            ctx.parameter.main_grad.fill_(ctx.value)
            ctx.parameter.main_grad_stale = False
        return grad, None, None


@pytest.fixture
def reducer():
    """Of three parameters, a chunk each."""
    size = ALIGNMENT
    layout = Layout({n: i * size for i, n in enumerate(NAMES)}, tuple(Chunk(i * size, size) for i in range(3)))
    parameters = {name: nn.Parameter(torch.ones(size)) for name in NAMES}
    flat = FlatParameters(parameters, lambda name: 0, lambda key, shapes: layout, alone("cpu"))
    (group,) = flat.groups
    taken, sums = group.zeros(torch.float32), group.shard_zeros(torch.float32)
    made = Reducer([(group, taken, sums)], parameters, alone("cpu"))
    for name, parameter in parameters.items():
        parameter.main_grad, parameter.main_grad_stale = group.view(taken, name), True
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: made.arrived(name))
    made.given, made.sums = parameters, sums
    return made


def backward(reducer, values, *, first):
    """A micro-batch that gives the parameters these gradients; None: none at all, though the parameter was used."""
    x = torch.ones(1, requires_grad=True)
    for parameter, value in zip(reducer.given.values(), values, strict=True):
        x = Written.apply(x, parameter, value)
    reducer.begin(first=first)
    x.sum().backward()
    reducer.finish()
    return [float(part[0]) for part in reducer.sums.split(ALIGNMENT)]


def test_micro_batches_are_added_and_steps_begin_anew(reducer):
    assert backward(reducer, (1.0, 2.0, 3.0), first=True) == [1.0, 2.0, 3.0]
    assert backward(reducer, (1.0, 1.0, 1.0), first=False) == [2.0, 3.0, 4.0]
    assert backward(reducer, (5.0, 6.0, 7.0), first=True) == [5.0, 6.0, 7.0]


@pytest.mark.parametrize("missing", range(3))
def test_a_gradient_that_is_none_counts_as_zero(reducer, missing):
    """Not as what the micro-batch before has left in its place."""
    assert backward(reducer, (1.0, 2.0, 3.0), first=True) == [1.0, 2.0, 3.0]
    values = [None if i == missing else 1.0 for i in range(3)]
    wanted = [before + (value or 0.0) for before, value in zip((1.0, 2.0, 3.0), values, strict=True)]
    assert backward(reducer, values, first=False) == wanted
    assert backward(reducer, values, first=True) == [value or 0.0 for value in values]


def test_chunks_are_summed_in_one_order_whatever_arrives_first(reducer):
    """The backward's: from the last parameter to the first."""
    order = []
    scatter_sum = reducer._world.scatter_sum
    reducer._world.scatter_sum = lambda taken, piece: (order.append(taken.storage_offset()), scatter_sum(taken, piece))
    reducer.begin(first=True)
    reducer.arrived("first")
    assert order == []
    reducer.arrived("third")
    assert order == [2 * ALIGNMENT]
    reducer.arrived("second")
    assert order == [2 * ALIGNMENT, ALIGNMENT, 0]
    reducer.finish()
    assert len(order) == 3


def test_what_arrives_outside_of_a_micro_batch_is_not_summed(reducer):
    backward(reducer, (1.0, 2.0, 3.0), first=True)
    for name in NAMES:
        reducer.given[name].main_grad.fill_(9.0)
        reducer.arrived(name)
    assert [float(part[0]) for part in reducer.sums.split(ALIGNMENT)] == [1.0, 2.0, 3.0]
