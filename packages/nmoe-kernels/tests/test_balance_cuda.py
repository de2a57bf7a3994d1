"""The CUDA balance loss: what it takes, how a number of experts is worked on, and that no register is spilled; on a
GPU, values against float64 (`-m gpu`)."""

from typing import Any

import pytest
import torch
from nmoe.kernels.errors import ShapeError
from nmoe.kernels.reference import balance as reference
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("cuda.bindings", reason="the CUDA kernels are for Linux")
from nmoe.kernels.native import balance_cuda as module
from nmoe.kernels.native.balance_cuda import balance_loss

WEIGHT, DLOSS = 0.3, -1.7
ROUNDING = 2.0**-17
"""Relative, of a loss, whose terms are all positive, and of the terms of a gradient: fp32's exp of x errs by |x| 2^-23,
and |x| is up to 32 here."""

# T, E, K and G: each plan's experts, and fewer; full blocks, others, and sequences of less than one.
SHAPES = {
    "one": (1, 1, 1, 1),
    "one expert": (6, 1, 1, 2),
    "odd": (35, 9, 3, 5),
    "batch": (230, 9, 3, 1),
    "short": (12, 6, 2, 12),
    "many": (60, 5, 2, 20),
    "columns": (24, 67, 7, 3),
    "even": (64, 64, 6, 4),
    "few": (1000, 12, 3, 2),
    "under 64": (333, 60, 6, 3),
    "128": (259, 128, 8, 1),
    "under 256": (300, 200, 7, 2),
    "512": (263, 512, 10, 1),
    "1024": (140, 1000, 8, 1),
    "over 1024": (131, 1028, 8, 1),
    "wide": (9, 300, 8, 3),
    "all": (16, 4, 4, 2),
    "steps": (24_576, 256, 7, 3),
    "odd steps": (70_001, 67, 7, 1),
    "many sequences": (5000, 33, 5, 2500),
    "more sequences": (70_000, 8, 2, 70_000),
    "widest": (1030, 4096, 32, 2),
    "odd and wide": (1030, 4095, 8, 2),
    "super": (65_536, 256, 7, 32),
    "moonlet": (16_384, 64, 6, 4),
}


Case = tuple[torch.Tensor, torch.Tensor, int]
"""Logits, experts and sequences."""


def draw(name: str) -> Case:
    """Logits with some extremes, and choices that prefer some experts."""
    n_tokens, n_experts, top_k, sequences = SHAPES[name]
    generator = torch.Generator().manual_seed(len(name))
    logits = (torch.randn(n_tokens, n_experts, generator=generator) * 3).clamp(-32, 32)
    logits.flatten()[:: max(7, logits.numel() // 9)] = 32.0
    logits.flatten()[3 :: max(8, logits.numel() // 7)] = -32.0
    preferred = torch.randn(n_experts, generator=generator) * 3
    return logits, (logits + preferred).topk(top_k, dim=-1).indices.int(), sequences


def exact(logits: torch.Tensor, expert: torch.Tensor, sequences: int) -> dict[str, torch.Tensor]:
    """By the reference in float64; `terms`: the magnitude of what a gradient is a difference of."""
    logits = logits.detach().double().requires_grad_()
    (n_tokens, n_experts), top_k = logits.shape, expert.shape[1]
    loss = reference.balance_loss(logits, expert, n_sequences=sequences, weight=WEIGHT)
    (dlogits,) = torch.autograd.grad(loss, logits, torch.tensor(DLOSS).to(loss))
    score, length = logits.detach().sigmoid(), n_tokens // sequences
    count = torch.zeros_like(score).scatter_(1, expert.long(), 1.0).unflatten(0, (sequences, length)).sum(1)
    coefficient = (count * (WEIGHT * n_experts / top_k / length**2)).repeat_interleave(length, 0)
    share = score / score.sum(1, keepdim=True)
    terms = abs(DLOSS) * share * (coefficient + (coefficient * share).sum(1, keepdim=True))
    return {"loss": loss.detach(), "dlogits": dlogits, "terms": terms}


def near(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, bool]:
    """By result; each element of the gradient."""
    off = (found["dlogits"].double() - expected["dlogits"]).abs()
    return {
        "loss": bool((found["loss"].double() - expected["loss"]).abs() <= ROUNDING * expected["loss"]),
        "dlogits": bool((off <= ROUNDING * expected["terms"]).all()),
    }


# --- without a GPU ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mistake", "noticed"),
    [
        ("none", set()),
        ("one choice of one token", {"loss", "dlogits"}),
        ("sequences shifted", {"loss", "dlogits"}),
        ("last token", {"loss", "dlogits"}),
        ("token before", {"dlogits"}),
        ("expert before", {"loss", "dlogits"}),
        ("one sequence", {"loss", "dlogits"}),
    ],
)
def test_the_bounds_tell_mistakes_apart(mistake: str, noticed: set[str]) -> None:
    """Of float64 rounded to fp32, as what a GPU finds."""
    case = draw("odd")
    found = {name: tensor.float() for name, tensor in exact(*case).items()}
    logits, expert, sequences = case
    if mistake == "one choice of one token":
        expert = expert.clone()
        expert[20, 0] = min(set(range(9)) - set(expert[20].tolist()))
    elif mistake == "sequences shifted":
        expert = expert.roll(7, 0)
    elif mistake == "last token":
        logits = logits.clone()
        logits[-1] = 0
    elif mistake == "token before":
        logits = logits.view(5, 7, 9).flip(1).reshape(35, 9)
    elif mistake == "expert before":
        logits = logits.roll(1, 1)
    elif mistake == "one sequence":
        sequences = 1
    right = near(found, exact(logits, expert, sequences))
    assert {result for result, is_right in right.items() if not is_right} == noticed


def test_every_number_of_experts_has_a_plan_with_room_for_them() -> None:
    """Whole pieces only where they divide the experts, and start where 16 bytes do."""
    memory = torch.empty(4096 + 1)
    start = memory.data_ptr() % 16 // 4
    for n_experts in range(1, 4097):
        plan = module._plan(memory[start : start + n_experts][None])
        assert plan.pieces == 0 or (n_experts % 4 == 0 and n_experts <= plan.max_experts)
        assert (plan.pieces > 0) == (n_experts % 4 == 0 and n_experts <= 1024)
        assert plan.pieces > 0 or plan.lanes == 32
    assert module._plan(memory[1:65][None]).pieces == 0
    assert [module._plan(torch.empty(1, n)).max_experts for n in (4, 64, 68, 256, 260, 1024)] == [
        *(64, 64, 128, 256, 512, 1024)
    ]


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
def test_no_register_is_spilled_and_a_block_fits(arch: str, ahead: Any) -> None:
    """With the most experts' counts and shares in shared memory."""
    for source in module.SOURCES:
        found = ahead.cuda.get(source, arch).resources
        assert not found.spills, source.name
        threads = module._FINISH_THREADS if source.entry == "balance_finish" else 32 * module._WARPS
        assert found.registers * threads <= 1 << 16
        assert found.shared_bytes + 4 * 4096 * (1 + module._WARPS) <= 227 << 10


REFUSED = {
    "fp64": (
        {"logits": torch.float64},
        r"expected logits \(T, E\) of torch.float32 .* found \(6, 4\) of torch.float64",
    ),
    "vector": ({"logits_shape": (4,)}, r"found \(4,\) of"),
    "tokens": ({"logits_shape": (5, 4)}, r"found \(5, 4\) .* and \(6, 2\)"),
    "too many": ({"logits_shape": (6, 4097)}, r"E ≤ 4096 .* found \(6, 4097\)"),
    "on the CPU": ({"device": "cpu"}, "on one CUDA device, .* on cpu and"),
    "devices": ({"logits_device": "cuda:1"}, "on one CUDA device, .* on cuda:1 and .* on cuda:0"),
    "int64": ({"expert": torch.int64}, r"experts \(T, K\) of torch.int32 .* and \(6, 2\) of torch.int64"),
    "no choice": ({"expert_shape": (6, 0)}, r"1 ≤ K .* and \(6, 0\)"),
    "too many choices": ({"expert_shape": (6, 5)}, r"K ≤ E .* and \(6, 5\)"),
    "choices": ({"expert_shape": (6,)}, r"and \(6,\) of"),
    "rows": ({"logits_shape": (1 << 26, 64), "expert_shape": (1 << 26, 32)}, r"T·K < 2\^31"),
    "four sequences": ({"n_sequences": 4}, "found 6 tokens of 4 sequences: give whole sequences"),
    "no sequences": ({"n_sequences": 0}, "found 6 tokens of 0 sequences"),
    "no tokens": ({"logits_shape": (0, 4), "expert_shape": (0, 2)}, "found 0 tokens of 3 sequences"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refuses(what: str) -> None:
    changed, message = REFUSED[what]
    device = changed.get("device", "cuda:0")
    with FakeTensorMode():
        logits_device = changed.get("logits_device", device)
        logits = torch.empty(
            changed.get("logits_shape", (6, 4)), dtype=changed.get("logits", torch.float32), device=logits_device
        )
        expert = torch.empty(
            changed.get("expert_shape", (6, 2)), dtype=changed.get("expert", torch.int32), device=device
        )
        with pytest.raises(ShapeError, match=message):
            balance_loss(logits, expert, n_sequences=changed.get("n_sequences", 3), weight=0.5)


# --- on one ----------------------------------------------------------------------------------------------------------


class TestOnGpu:
    pytestmark = pytest.mark.gpu

    @staticmethod
    def run(logits: torch.Tensor, expert: torch.Tensor, sequences: int) -> dict[str, torch.Tensor]:
        loss = balance_loss(logits, expert, n_sequences=sequences, weight=WEIGHT)
        (dlogits,) = torch.autograd.grad(loss, logits, torch.full_like(loss, DLOSS))
        return {"loss": loss.detach(), "dlogits": dlogits}

    @staticmethod
    def operands(gpu: str, name: str) -> Case:
        logits, expert, sequences = draw(name)
        return logits.to(gpu).requires_grad_(), expert.to(gpu), sequences

    @pytest.mark.parametrize("name", SHAPES)
    def test_equals_float64(self, gpu: str, name: str) -> None:
        """And the same bits again, on memory that held something else."""
        logits, expert, sequences = self.operands(gpu, name)
        poison = [torch.full_like(logits, torch.nan) for _ in range(4)]
        del poison  # the allocator gives it again: an element that is not written must not look right
        found = self.run(logits, expert, sequences)
        assert found["loss"].shape == ()
        assert near(found, exact(logits, expert, sequences)) == {"loss": True, "dlogits": True}
        for _ in range(5):
            again = self.run(logits, expert, sequences)
            assert all(torch.equal(again[key], value) for key, value in found.items())

    @pytest.mark.parametrize("name", ["even", "steps"])
    def test_logits_off_by_a_word(self, gpu: str, name: str) -> None:
        """A view that 16-byte loads cannot read, and what is beside it NaN."""
        logits, expert, sequences = self.operands(gpu, name)
        memory = torch.full((logits.numel() + 9,), torch.nan, device=gpu)
        moved = memory[1 : 1 + logits.numel()].view(logits.shape).copy_(logits.detach()).requires_grad_()
        found = self.run(moved, expert, sequences)
        assert near(found, exact(logits, expert, sequences)) == {"loss": True, "dlogits": True}

    def test_strides_change_nothing(self, gpu: str) -> None:
        """Of logits, experts, and a gradient that is a view."""
        logits, expert, sequences = self.operands(gpu, "even")
        expected = self.run(logits, expert, sequences)
        strided = logits.detach().t().contiguous().t().requires_grad_()
        found = self.run(strided, expert.t().contiguous().t(), sequences)
        assert all(torch.equal(found[key], value) for key, value in expected.items())

    def test_in_a_cuda_graph(self, gpu: str, capture: Any) -> None:
        """A replay sees the logits and the choices of its time, and its bits are those of a plain run."""
        logits, expert, sequences = self.operands(gpu, "steps")
        first = self.run(logits, expert, sequences)
        graph, captured = capture(lambda: self.run(logits, expert, sequences))
        with torch.no_grad():
            logits.copy_(torch.randn_like(logits))
            expert.copy_(logits.topk(expert.shape[1], dim=-1).indices)
        graph.replay()
        plain = self.run(logits, expert, sequences)
        assert all(torch.equal(captured[key], value) for key, value in plain.items())
        assert not torch.equal(captured["loss"], first["loss"])

    def test_places_beyond_2_to_31(self, gpu: str) -> None:
        """Elements of (T, E) that no int32 counts: the last sequence alone has scores that differ, and its gradient is
        that of itself alone."""
        if torch.cuda.mem_get_info()[0] < 32 << 30:
            pytest.skip("needs 32 GiB of free device memory")
        length, n_experts, sequences = 4096, 4096, 129
        few = torch.randn(length, n_experts, device=gpu).requires_grad_()
        chosen = few.topk(2, dim=-1).indices.int()
        logits = torch.zeros(sequences * length, n_experts, device=gpu)
        expert = torch.zeros(sequences * length, 2, dtype=torch.int32, device=gpu)
        with torch.no_grad():
            logits[-length:] = few
            expert[:, 1] = 1
            expert[-length:] = chosen
        found = self.run(logits.requires_grad_(), expert, sequences)
        alone = self.run(few, chosen, 1)
        off = (found["dlogits"][-length:] - alone["dlogits"]).abs()
        # Other blocks, other sums: of c alone, which is exact.
        assert torch.equal(off, torch.zeros_like(off))
        even = WEIGHT * (sequences - 1)  # shares of 1/E
        assert abs(float(found["loss"]) - even - float(alone["loss"])) <= ROUNDING * (even + float(alone["loss"]))
