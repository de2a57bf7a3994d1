"""The routed experts against one loop over tokens and slots, and their hand-derived backward by finite differences."""

import pytest
import torch
from nmoe.kernels.errors import ShapeError
from nmoe.kernels.ops import Ops
from nmoe.kernels.reference import experts
from nmoe.kernels.reference.grouped_gemm import grouped_gemm
from nmoe.kernels.reference.routing import index_rows

TOKENS, WIDTH, HIDDEN, EXPERTS, TOP_K = 9, 6, 5, 4, 2


def choices(case: str) -> torch.Tensor:
    """Experts of each token and slot."""
    if case == "all_to_one":
        return torch.tensor([[2, 1]]).expand(TOKENS, -1).contiguous()
    if case == "empty_experts":  # experts 0 and 3 get no rows
        return torch.tensor([[1, 2], [2, 1], [1, 2]]).repeat(3, 1)
    return torch.rand(TOKENS, EXPERTS).argsort(1)[:, :TOP_K].contiguous()


CASES = ["ragged", "empty_experts", "all_to_one"]


def draw(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """x, gates (the first token's are exactly 0), w13 and w2."""
    gate_TK = torch.rand(TOKENS, TOP_K, dtype=torch.float64)
    gate_TK[0] = 0.0
    gate_TK[3, 1] = 0.0
    wide = torch.promote_types(dtype, torch.float32)
    return [
        torch.randn(TOKENS, WIDTH, dtype=torch.float64).to(dtype),
        gate_TK.to(wide),
        torch.randn(EXPERTS, 2, HIDDEN, WIDTH, dtype=torch.float64).to(dtype) * 0.5,
        torch.randn(EXPERTS, WIDTH, HIDDEN, dtype=torch.float64).to(dtype) * 0.5,
    ]


def naive(
    x: torch.Tensor, gate_TK: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, expert_TK: torch.Tensor
) -> torch.Tensor:
    """Differentiable by autograd; float64."""
    x, gate_TK, w13, w2 = (tensor.double() for tensor in (x, gate_TK, w13, w2))
    rows = []
    for t in range(x.shape[0]):
        out = torch.zeros(x.shape[1], dtype=torch.float64)
        for k in range(expert_TK.shape[1]):
            e = int(expert_TK[t, k])
            gate, up = w13[e, 0] @ x[t], w13[e, 1] @ x[t]
            out = out + gate_TK[t, k] * (w2[e] @ (gate * gate.sigmoid() * up))
        rows.append(out)
    return torch.stack(rows)


def naive_gradients(inputs: list[torch.Tensor], expert_TK: torch.Tensor, dout: torch.Tensor) -> list[torch.Tensor]:
    leaves = [tensor.detach().double().requires_grad_() for tensor in inputs]
    naive(*leaves, expert_TK).backward(dout.double())
    return [leaf.grad for leaf in leaves]


def gradients(ops: Ops, inputs: list[torch.Tensor], expert_TK: torch.Tensor, dout: torch.Tensor) -> list[torch.Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    x, gate_TK, w13, w2 = leaves
    ops.experts(x, index_rows(expert_TK, EXPERTS), gate_TK, w13, w2).backward(dout)
    return [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("case", CASES)
def test_forward_equals_the_loop(ops: Ops, case: str) -> None:
    expert_TK, (x, gate_TK, w13, w2) = choices(case), draw()
    found = ops.experts(x, index_rows(expert_TK, EXPERTS), gate_TK, w13, w2)
    torch.testing.assert_close(found, naive(x, gate_TK, w13, w2, expert_TK), rtol=1e-12, atol=1e-14)
    assert torch.equal(found[0], torch.zeros(WIDTH, dtype=torch.float64)), "gates of 0 give exactly 0"


@pytest.mark.parametrize("case", CASES)
def test_gradients_by_finite_differences(ops: Ops, case: str) -> None:
    expert_TK = choices(case)
    index = index_rows(expert_TK, EXPERTS)
    inputs = [tensor.requires_grad_() for tensor in draw()]
    assert torch.autograd.gradcheck(lambda x, gate_TK, w13, w2: ops.experts(x, index, gate_TK, w13, w2), inputs)


@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_autograd_of_the_loop(ops: Ops, case: str) -> None:
    expert_TK, inputs = choices(case), draw()
    dout = torch.randn(TOKENS, WIDTH, dtype=torch.float64)
    found, expected = gradients(ops, inputs, expert_TK, dout), naive_gradients(inputs, expert_TK, dout)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
    assert found[1][0].abs().min() > 0, "a gate of 0 has a gradient"
    if case == "empty_experts":
        assert not found[2][[0, 3]].any()
        assert not found[3][[0, 3]].any()


def test_the_oracle_tells_wrong_gate_gradients_apart(ops: Ops) -> None:
    """The gate's gradient of gated rows, and that divided by the gate again."""
    expert_TK, inputs = choices("ragged"), draw()
    dout = torch.randn(TOKENS, WIDTH, dtype=torch.float64)
    right, gate_TK = naive_gradients(inputs, expert_TK, dout)[1], inputs[1]
    found = gradients(ops, inputs, expert_TK, dout)[1]
    gated = right * gate_TK
    assert not torch.allclose(found, gated, rtol=1e-2, atol=1e-4)
    assert not torch.allclose(found, gated / gate_TK, rtol=1e-2, atol=1e-4), "0 / 0 where the gate is 0"


@pytest.mark.parametrize("power", [0, 2], ids=["gate_left_out", "gate_twice"])
@pytest.mark.parametrize("input", [0, 2, 3], ids=["dx", "dw13", "dw2"])
def test_the_oracle_tells_wrong_gating_apart(ops: Ops, power: int, input: int) -> None:
    expert_TK, (x, gate_TK, w13, w2) = choices("ragged"), draw()
    dout = torch.randn(TOKENS, WIDTH, dtype=torch.float64)
    found = gradients(ops, [x, gate_TK, w13, w2], expert_TK, dout)[input]
    wrong = naive_gradients([x, gate_TK**power, w13, w2], expert_TK, dout)[input]
    assert not torch.allclose(found, wrong, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("mistake", ["halves swapped in backward", "rows of the next token"])
def test_the_oracle_tells_mistakes_apart(ops: Ops, mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expert_TK, inputs = choices("ragged"), draw()
    dout = torch.randn(TOKENS, WIDTH, dtype=torch.float64)
    expected = naive_gradients(inputs, expert_TK, dout)[0]
    if mistake == "halves swapped in backward":
        right = experts.swiglu_backward
        monkeypatch.setattr(experts, "swiglu_backward", lambda d, pre: right(d, pre).roll(HIDDEN, -1))
        found = gradients(ops, inputs, expert_TK, dout)[0]
    else:
        index = index_rows(expert_TK, EXPERTS)
        x, gate_TK, w13, w2 = (tensor.requires_grad_() for tensor in inputs)
        shifted = index._replace(row_TK=index.row_TK.roll(1, 0))
        ops.experts(x, shifted, gate_TK, w13, w2).backward(dout)
        found = x.grad
    assert not torch.allclose(found, expected, rtol=1e-2, atol=1e-3)


def test_main_grad_is_added_to_and_autograd_gets_nothing(ops: Ops) -> None:
    expert_TK, inputs = choices("ragged"), draw()
    x, gate_TK, w13, w2 = (tensor.requires_grad_() for tensor in inputs)
    before = [torch.randn_like(w) for w in (w13, w2)]
    w13.main_grad, w2.main_grad = (tensor.clone() for tensor in before)
    index = index_rows(expert_TK, EXPERTS)
    expected = list(before)
    for _ in range(2):
        dout = torch.randn(TOKENS, WIDTH, dtype=torch.float64)
        ops.experts(x, index, gate_TK, w13, w2).backward(dout)
        added = naive_gradients(inputs, expert_TK, dout)[2:]
        expected = [a + b for a, b in zip(expected, added, strict=True)]
    assert w13.grad is None
    assert w2.grad is None
    torch.testing.assert_close(w13.main_grad, expected[0], rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(w2.main_grad, expected[1], rtol=1e-11, atol=1e-13)


def test_a_stale_main_grad_is_overwritten_once(ops: Ops) -> None:
    """Whatever stands there, NaN included, and for experts without rows too; the next gradient is added."""
    expert_TK, inputs = choices("empty_experts"), draw()
    x, gate_TK, w13, w2 = (tensor.requires_grad_() for tensor in inputs)
    for weight in (w13, w2):
        weight.main_grad, weight.main_grad_stale = torch.full_like(weight, float("nan")), True
    index, dout = index_rows(expert_TK, EXPERTS), torch.randn(TOKENS, WIDTH, dtype=torch.float64)
    expected = naive_gradients(inputs, expert_TK, dout)[2:]
    for times in (1, 2):
        ops.experts(x, index, gate_TK, w13, w2).backward(dout)
        for weight, once in zip((w13, w2), expected, strict=True):
            assert weight.grad is None
            assert not weight.main_grad[[0, 3]].any()
            torch.testing.assert_close(weight.main_grad, times * once, rtol=1e-11, atol=1e-13)


def test_bfloat16_weights_have_float32_gradients(ops: Ops) -> None:
    """main_grad errs by the roundings of what enters the product (pre-activation, h, dh, dpre: 2^-8 each), and its
    sums are not rounded to bf16 on top: of 512 equal terms a bf16 sum would stop growing at the 256th."""
    expert_TK = torch.zeros(512, 1, dtype=torch.int64)
    x, w13, w2 = torch.full((512, 4), 0.5), torch.full((1, 2, 4, 4), 0.25), torch.full((1, 4, 4), 0.25)
    x, w13, w2 = (tensor.bfloat16() for tensor in (x, w13, w2))
    gate_TK, dout = torch.full((512, 1), 0.75), torch.ones(512, 4).bfloat16()
    expected = naive_gradients([x, gate_TK, w13, w2], expert_TK, dout)
    x, w13, w2 = (tensor.requires_grad_() for tensor in (x, w13, w2))
    w13.main_grad, w2.main_grad = torch.zeros(w13.shape), torch.zeros(w2.shape)
    index = index_rows(expert_TK[:1], 1)
    for t in range(512):
        ops.experts(x[t : t + 1], index, gate_TK[t : t + 1], w13, w2).backward(dout[t : t + 1])
    torch.testing.assert_close(w13.main_grad.double(), expected[2], rtol=6 * 2**-8, atol=0)
    torch.testing.assert_close(w2.main_grad.double(), expected[3], rtol=6 * 2**-8, atol=0)


def test_bfloat16_sums_slots_in_float32(ops: Ops) -> None:
    """A token whose rows cancel: 256, then 1, then -256. A bf16 sum in slot order would lose the 1."""
    x = torch.ones(1, 1).bfloat16()
    w13 = torch.tensor([[20.0], [20.0]]).expand(3, 2, 1).reshape(3, 2, 1, 1).bfloat16()
    w2 = (torch.tensor([256.0, 1.0, -256.0]) / 400.0).view(3, 1, 1).bfloat16()
    expert_TK = torch.tensor([[0, 1, 2]])
    found = ops.experts(x, index_rows(expert_TK, 3), torch.ones(1, 3), w13, w2)
    torch.testing.assert_close(found.double(), naive(x, torch.ones(1, 3), w13, w2, expert_TK), rtol=2**-6, atol=0)


def test_same_inputs_same_bits(ops: Ops) -> None:
    expert_TK, inputs = choices("ragged"), draw(torch.float32)
    dout = torch.randn(TOKENS, WIDTH)
    first, second = (gradients(ops, inputs, expert_TK, dout) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_frozen_weights_cost_no_gradient(ops: Ops) -> None:
    expert_TK, (x, gate_TK, w13, w2) = choices("ragged"), draw()
    x.requires_grad_()
    no_wgrad = experts.GroupedGemms(grouped_gemm, pytest.fail)
    experts.experts(no_wgrad, x, index_rows(expert_TK, EXPERTS), gate_TK, w13, w2).sum().backward()
    expected = naive_gradients([x, gate_TK, w13, w2], expert_TK, torch.ones(TOKENS, WIDTH))[0]
    torch.testing.assert_close(x.grad, expected, rtol=1e-11, atol=1e-13)


def test_keeps_input_pre_activation_and_indices(ops: Ops) -> None:
    """Neither activations nor outputs of the rows: a row costs 2·F, and no more, until the backward."""
    kept: list[torch.Tensor] = []
    expert_TK, inputs = choices("ragged"), draw()
    x, gate_TK, w13, w2 = (tensor.requires_grad_() for tensor in inputs)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.experts(x, index_rows(expert_TK, EXPERTS), gate_TK, w13, w2)
    floats = [tuple(t.shape) for t in kept if t.is_floating_point()]
    assert sorted(floats) == sorted([(TOKENS, WIDTH), (TOKENS, TOP_K), (TOKENS * TOP_K, 2 * HIDDEN)])


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("x", (TOKENS, WIDTH + 1)),
        ("x", (TOKENS + 1, WIDTH)),
        ("gate_TK", (TOKENS, TOP_K + 1)),
        ("w13", (EXPERTS, 3, HIDDEN, WIDTH)),
        ("w2", (EXPERTS, HIDDEN, WIDTH)),
        ("w2", (EXPERTS + 1, WIDTH, HIDDEN)),
    ],
)
def test_refuses_shapes_that_do_not_belong_together(ops: Ops, name: str, shape: tuple[int, ...]) -> None:
    inputs = dict(zip(("x", "gate_TK", "w13", "w2"), draw(), strict=True))
    inputs[name] = torch.zeros(shape, dtype=torch.float64)
    index = index_rows(choices("ragged"), EXPERTS)
    with pytest.raises(ShapeError, match=r"expected .* found"):
        ops.experts(inputs["x"], index, inputs["gate_TK"], inputs["w13"], inputs["w2"])
