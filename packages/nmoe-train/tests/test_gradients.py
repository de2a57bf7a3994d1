import pytest
import torch
from nmoe.kernels.ops import select_ops
from nmoe.train.flat import FlatParameters
from nmoe.train.gradients import Gradients, clip_factor
from torch import nn


def accumulate(parameters):
    """Gradients of these: weights in one group, biases in another."""
    flat = FlatParameters(dict(parameters), lambda name: name.endswith("bias"))
    return Gradients(flat, select_ops("reference", "cpu"))


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
        torch.testing.assert_close(gradients.by_name[name], parameter.grad)
    assert all(parameter.grad is None for parameter in ours.parameters())


def test_bf16_gradients_are_summed_in_fp32():
    parameter = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    gradients = accumulate([("p", parameter)])
    gradients.zero()
    for _ in range(300):  # bf16 would stop counting at 256
        parameter.sum().backward()
    assert gradients.by_name["p"].item() == 300.0


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
            assert torch.equal(gradients.by_name[name], parameter.grad), f"{name} in step {step}"
        assert not gradients.by_name["1.weight"].any(), "no gradient reached it"
        for parameter in ours.parameters():
            parameter.main_grad.fill_(float("nan"))


@pytest.mark.parametrize("read", ["by_name", "buffers", "norm", "not_finite"])
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
    elif read == "buffers":
        assert sum(buffer.sum() for buffer in gradients.buffers) == 5 * 4 + 5
    else:
        assert not gradients.by_name["1.weight"].any()
    ours[1](torch.ones(1, 5)).sum().backward()
    assert gradients.by_name["1.weight"].eq(1.0).all(), "a gradient after a reading is added to the zeros"
    assert gradients.by_name["0.bias"].eq(1.0).all(), "reading again clears nothing"


def test_a_new_step_touches_no_memory():
    gradients = accumulate(model().named_parameters())
    before = {name: grad.fill_(3.0) for name, grad in gradients.by_name.items()}
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
        torch.testing.assert_close(gradients.by_name[name] * factor, parameter.grad)


def test_small_gradients_and_no_limit_are_left_alone():
    assert clip_factor(torch.tensor(0.5), 1.0).item() == 1.0
    assert clip_factor(torch.tensor(50.0), None).item() == 1.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_names_the_parameters_that_are_not_finite(bad):
    gradients = accumulate(model().named_parameters())
    gradients.by_name["1.weight"][2, 3] = bad
    assert gradients.not_finite() == ["1.weight"]


def test_accumulators_are_aligned_views_of_the_groups_buffers():
    ours = model()
    gradients = accumulate(ours.named_parameters())
    before = [buffer.data_ptr() for buffer in gradients.buffers]
    for name, parameter in ours.named_parameters():
        assert parameter.main_grad is gradients.by_name[name]
        assert parameter.main_grad.is_contiguous()
        buffer = gradients.buffers["bias" in name]
        offset = parameter.main_grad.data_ptr() - buffer.data_ptr()
        assert offset % 128 == 0
        assert 0 <= offset <= buffer.nbytes - parameter.main_grad.nbytes
    ours(torch.ones(1, 4)).sum().backward()
    assert sum(float(buffer.abs().sum()) for buffer in gradients.buffers) > 0
    assert [buffer.data_ptr() for buffer in gradients.buffers] == before


def test_what_lies_between_gradients_is_zero():
    ours = model()
    gradients = accumulate(ours.named_parameters())
    for _ in range(2):
        gradients.zero()
        ours(torch.randn(3, 4)).square().sum().backward()
    inside = sum(grad.count_nonzero() for grad in gradients.by_name.values())
    assert sum(buffer.count_nonzero() for buffer in gradients.buffers) == inside
    assert sum(buffer.numel() for buffer in gradients.buffers) > sum(p.numel() for p in ours.parameters())
