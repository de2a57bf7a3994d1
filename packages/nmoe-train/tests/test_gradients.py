import pytest
import torch
from nmoe.kernels.ops import select_ops
from nmoe.rdep.world import alone
from nmoe.train.flat import FlatParameters
from nmoe.train.gradients import Gradients, clip_factor
from nmoe.train.layout import side_by_side
from torch import nn


def accumulate(parameters):
    """Gradients of these: weights in one group, biases in another."""
    lay_out = lambda key, shapes: side_by_side(shapes)  # noqa: E731
    flat = FlatParameters(dict(parameters), lambda name: name.endswith("bias"), lay_out, alone("cpu"))
    return Gradients(flat, select_ops("reference", "cpu"))


def by_name(gradients):
    """One rank has all of every gradient in one part."""
    return {name: part for name, (part,) in gradients.parts.items()}


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3, bias=False))


def test_micro_batches_sum_and_nothing_stays_in_grad():
    ours, plain = model(), model()
    gradients = accumulate(ours.named_parameters())
    gradients.zero()
    for i in range(3):
        x = torch.full((2, 4), float(i + 1))
        ours(x).sum().backward()
        plain(x).sum().backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(by_name(gradients)[name], parameter.grad)
    assert all(parameter.grad is None for parameter in ours.parameters())


def test_bf16_gradients_are_summed_in_fp32():
    parameter = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    gradients = accumulate([("p", parameter)])
    gradients.zero()
    for _ in range(300):  # bf16 would stop counting at 256
        parameter.sum().backward()
    assert by_name(gradients)["p"].item() == 300.0


def test_zero_starts_a_new_step():
    ours = model()
    gradients = accumulate(ours.named_parameters())
    ours(torch.ones(1, 4)).sum().backward()
    gradients.zero()
    assert gradients.norm().item() == 0.0


def test_nothing_of_the_last_step_survives():
    """Neither where a gradient came nor where none did, not even a NaN."""
    ours, plain = model(), model()
    gradients = accumulate(ours.named_parameters())
    for step in range(3):
        gradients.zero()
        plain.zero_grad()
        for x in torch.randn(2, 2, 4):  # the first overwrites, the second is added
            ours[0](x).sum().backward()
            plain[0](x).sum().backward()
        for name, parameter in plain[0].named_parameters(prefix="0"):
            assert torch.equal(by_name(gradients)[name], parameter.grad), f"{name} in step {step}"
        assert not by_name(gradients)["1.weight"].any(), "no gradient reached it"
        for parameter in ours.parameters():
            parameter.main_grad.fill_(float("nan"))


@pytest.mark.parametrize("read", ["parts", "sums", "norm", "not_finite"])
def test_every_reader_clears_what_no_gradient_has_reached(read):
    ours = model()
    gradients = accumulate(ours.named_parameters())
    for parameter in ours.parameters():
        parameter.main_grad.fill_(float("nan"))
    gradients.zero()
    ours[0](torch.ones(1, 4)).sum().backward()
    if read == "norm":
        assert gradients.norm().item() == pytest.approx((5 * 4 + 5) ** 0.5)
    elif read == "not_finite":
        assert gradients.not_finite() == []
    elif read == "sums":
        assert sum(buffer.sum() for buffer in gradients.sums) == 5 * 4 + 5
    else:
        assert not by_name(gradients)["1.weight"].any()
    ours[1](torch.ones(1, 5)).sum().backward()
    assert by_name(gradients)["1.weight"].eq(1.0).all(), "a gradient after a reading is added to the zeros"
    assert by_name(gradients)["0.bias"].eq(1.0).all(), "reading again clears nothing"


def test_a_new_step_touches_no_memory():
    gradients = accumulate(model().named_parameters())
    before = {name: grad.fill_(3.0) for name, grad in by_name(gradients).items()}
    gradients.zero()
    assert all(grad.eq(3.0).all() for grad in before.values())


def test_norm_and_clipping_equal_torchs():
    ours, plain = model(), model()
    gradients = accumulate(ours.named_parameters())
    for m in (ours, plain):
        (m(torch.randn(8, 4, generator=torch.Generator().manual_seed(1))) * 10).square().sum().backward()
    expected = torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
    norm = gradients.norm()
    torch.testing.assert_close(norm, expected)
    factor = clip_factor(norm, 1.0)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(by_name(gradients)[name] * factor, parameter.grad)


def test_small_gradients_and_no_limit_are_left_alone():
    assert clip_factor(torch.tensor(0.5), 1.0).item() == 1.0
    assert clip_factor(torch.tensor(50.0), None).item() == 1.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_names_the_parameters_that_are_not_finite(bad):
    gradients = accumulate(model().named_parameters())
    by_name(gradients)["1.weight"][2, 3] = bad
    assert gradients.not_finite() == ["1.weight"]


def test_accumulators_are_aligned_views_of_the_groups_buffers():
    ours = model()
    gradients = accumulate(ours.named_parameters())
    before = [buffer.data_ptr() for buffer in gradients.sums]
    for name, parameter in ours.named_parameters():
        assert parameter.main_grad.data_ptr() == by_name(gradients)[name].data_ptr()
        assert parameter.main_grad.shape == by_name(gradients)[name].shape == parameter.shape
        assert parameter.main_grad.is_contiguous()
        buffer = gradients.sums["bias" in name]
        offset = parameter.main_grad.data_ptr() - buffer.data_ptr()
        assert offset % 128 == 0
        assert 0 <= offset <= buffer.nbytes - parameter.main_grad.nbytes
    ours(torch.ones(1, 4)).sum().backward()
    assert sum(float(buffer.abs().sum()) for buffer in gradients.sums) > 0
    assert [buffer.data_ptr() for buffer in gradients.sums] == before


def test_what_lies_between_gradients_is_zero():
    ours = model()
    gradients = accumulate(ours.named_parameters())
    for _ in range(2):
        gradients.zero()
        ours(torch.randn(3, 4)).square().sum().backward()
    inside = sum(grad.count_nonzero() for grad in by_name(gradients).values())
    assert sum(buffer.count_nonzero() for buffer in gradients.sums) == inside
    assert sum(buffer.numel() for buffer in gradients.sums) > sum(p.numel() for p in ours.parameters())


def test_bits_tell_which_parameters_gradient_is_another():
    ours = model()
    gradients = accumulate(ours.named_parameters())
    ours(torch.ones(2, 4)).sum().backward()
    before = gradients.bits()
    assert torch.equal(gradients.bits(), before)
    accumulator = by_name(gradients)["0.bias"]
    accumulator[2] = torch.nextafter(accumulator[2], torch.tensor(1e9))
    assert (gradients.bits() != before).tolist() == [name == "0.bias" for name, _ in ours.named_parameters()]
