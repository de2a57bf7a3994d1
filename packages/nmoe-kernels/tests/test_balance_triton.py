"""The Triton balance loss: in the interpreter against float64 without a GPU; on one, the same and more (`-m gpu`)."""

from typing import Any

import numpy as np
import pytest
import torch
from nmoe.kernels.errors import ShapeError
from nmoe.kernels.reference import balance as reference

pytest.importorskip("triton", reason="Triton is for Linux")

WEIGHT, DLOSS = 0.3, -1.7
"""As in `balance_interpreted`."""

ROUNDING = 2.0**-17
"""Relative, of a loss, whose terms are all positive, and of the terms of a gradient: fp32's exp of x errs by |x| 2^-23,
and |x| is up to 32 here."""

# T, E, K and G. Of the interpreter's programs each has steps of 128 elements, 32 columns or more.
SHAPES = {
    "one": (1, 1, 1, 1),
    "one expert": (6, 1, 1, 2),
    "odd": (35, 9, 3, 5),
    "batch": (230, 9, 3, 1),
    "short": (12, 6, 2, 12),
    "many": (60, 5, 2, 20),
    "columns": (24, 67, 7, 3),
    "even": (64, 64, 6, 4),
    "wide": (9, 300, 8, 3),
    "all": (16, 4, 4, 2),
}
GPU_SHAPES = SHAPES | {
    "steps": (24_576, 256, 7, 3),
    "odd steps": (70_001, 67, 7, 1),
    "many sequences": (5000, 33, 5, 2500),
    "widest": (1030, 4096, 32, 2),
    "odd and wide": (1030, 4095, 8, 2),
    "super": (65_536, 256, 7, 32),
    "moonlet": (16_384, 64, 6, 4),
}


def draw(name: str) -> dict[str, np.ndarray]:
    """Logits with some extremes, and choices that prefer some experts."""
    n_tokens, n_experts, top_k, sequences = GPU_SHAPES[name]
    generator = torch.Generator().manual_seed(len(name))
    logits = (torch.randn(n_tokens, n_experts, generator=generator) * 3).clamp(-32, 32)
    logits.flatten()[:: max(7, logits.numel() // 9)] = 32.0
    logits.flatten()[3 :: max(8, logits.numel() // 7)] = -32.0
    preferred = torch.randn(n_experts, generator=generator) * 3
    expert = (logits + preferred).topk(top_k, dim=-1).indices.int()
    return {"logits": logits.numpy(), "expert": expert.numpy(), "sequences": np.array(sequences)}


def exact(case: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """By the reference in float64; `terms`: the magnitude of what a gradient is a difference of."""
    logits, expert = torch.from_numpy(case["logits"]).double().requires_grad_(), torch.from_numpy(case["expert"])
    sequences, (n_tokens, n_experts), top_k = int(case["sequences"]), logits.shape, expert.shape[1]
    loss = reference.balance_loss(logits, expert, n_sequences=sequences, weight=WEIGHT)
    (dlogits,) = torch.autograd.grad(loss, logits, torch.tensor(DLOSS).double())
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


def of(interpreted: dict[str, np.ndarray], name: str) -> dict[str, torch.Tensor]:
    return {result: torch.from_numpy(interpreted[f"{name}/{result}"]) for result in ("loss", "dlogits")}


@pytest.fixture(scope="module")
def interpreted(interpret: Any) -> dict[str, np.ndarray]:
    return interpret("balance_interpreted.py", {name: draw(name) for name in SHAPES})


@pytest.mark.parametrize("name", SHAPES)
def test_interpreted_equals_float64(interpreted: dict[str, np.ndarray], name: str) -> None:
    found = of(interpreted, name)
    assert found["loss"].shape == ()
    assert near(found, exact(draw(name))) == {"loss": True, "dlogits": True}
    assert not interpreted[f"{name}/beyond"].any()


@pytest.mark.parametrize(
    ("mistake", "noticed"),
    [
        ("one choice of one token", {"loss", "dlogits"}),
        ("sequences exchanged", {"dlogits"}),
        ("sequences shifted", {"loss", "dlogits"}),
        ("last token", {"loss", "dlogits"}),
        ("token before", {"dlogits"}),
        ("expert before", {"loss", "dlogits"}),
        ("one sequence", {"loss", "dlogits"}),
        ("sum not differentiated", {"dlogits"}),
    ],
)
def test_the_bounds_tell_mistakes_apart(interpreted: dict[str, np.ndarray], mistake: str, noticed: set[str]) -> None:
    case = draw("odd")
    if mistake == "one choice of one token":
        case["expert"][20, 0] = min(set(range(9)) - set(case["expert"][20].tolist()))
    elif mistake == "sequences exchanged":  # the loss is their sum, in whatever order
        case["expert"], case["logits"] = (np.roll(case[key], 7, 0) for key in ("expert", "logits"))
    elif mistake == "sequences shifted":
        case["expert"] = np.roll(case["expert"], 7, 0)
    elif mistake == "last token":
        case["logits"][-1] = 0
    elif mistake == "token before":
        case["logits"] = case["logits"].reshape(5, 7, 9)[:, ::-1].reshape(35, 9).copy()
    elif mistake == "expert before":
        case["logits"] = np.roll(case["logits"], 1, 1)
    elif mistake == "one sequence":
        case["sequences"] = np.array(1)
    expected = exact(case)
    if mistake == "sum not differentiated":
        logits, expert = (torch.from_numpy(case[key]).double() for key in ("logits", "expert"))
        score = logits.sigmoid()
        count = torch.zeros_like(score).scatter_(1, expert.long(), 1.0).unflatten(0, (5, 7)).sum(1)
        coefficient = (count * (WEIGHT * 9 / 3 / 49)).repeat_interleave(7, 0)
        expected["dlogits"] = DLOSS * coefficient * score * (1 - score) / score.sum(1, keepdim=True)
    found = near(of(interpreted, "odd"), expected)
    assert {result for result, right in found.items() if not right} == noticed


def test_what_is_compiled_ahead_is_what_is_launched(launches_of: Any) -> None:
    """For super's experts; what differs between numbers of tokens has one compile."""
    from nmoe.kernels.native import balance_triton as module

    by_name = {kernel.name: kernel for kernel in module.TRITON_KERNELS}
    listed = {kernel.function: kernel for name, kernel in by_name.items() if not name.endswith(("_64", "_4096"))}
    functions = {name: getattr(module, name) for name in listed}
    launches = {name: launches_of(module, name) for name in listed}
    logits, expert = torch.zeros(6144, 256).requires_grad_(), torch.zeros(6144, 7, dtype=torch.int32)
    module.balance_loss(logits, expert, n_sequences=3, weight=0.5).backward()
    grids = {"_sum_shares_kernel": (3 * 256,), "_sum_blocks_kernel": (3, 8), "_balance_backward_kernel": (3 * 256,)}
    for name, kernel in listed.items():
        launched, function = launches[name], functions[name]
        types = {torch.float32: "*fp32", torch.int32: "*i32", int: "i32", float: "fp32"}
        kinds = [types[x.dtype if isinstance(x, torch.Tensor) else type(x)] for x in launched.args]
        assert kernel.signature == tuple(zip(function.arg_names, kinds, strict=False))
        assert launched.options == dict((*kernel.constants, *kernel.options))
        assert [constant for constant, _ in kernel.constants] == function.arg_names[len(kinds) :]
        pointers = {argument for argument, kind in kernel.signature if kind[0] == "*"}
        assert set(kernel.aligned) == pointers | {"n_experts"}
        assert launched.grid == grids[name]


def test_blocks_cover_each_sequence_once_and_none_is_empty() -> None:
    """Whatever the length; a whole number of steps each but the last."""
    from nmoe.kernels.native.balance_triton import _PROGRAMS, _blocks

    for length in (1, 7, 8, 9, 63, 64, 2048, 2049, 65_536, 1 << 22):
        for n_sequences in (1, 3, 32, 1024, 5000):
            for rows in (1, 8, 64):
                block, blocks = _blocks(length, n_sequences, rows)
                assert block % rows == 0
                assert (blocks - 1) * block < length <= blocks * block
                assert n_sequences * blocks <= max(_PROGRAMS, n_sequences)


LOGITS, EXPERT = torch.zeros(6, 4), torch.zeros(6, 2, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"logits_TE": LOGITS.double()},
            r"expected logits \(T, E\) of torch.float32 .* found \(6, 4\) of torch.float64",
        ),
        ({"logits_TE": LOGITS[0]}, r"found \(4,\) of"),
        ({"logits_TE": LOGITS[:5]}, r"found \(5, 4\) .* and \(6, 2\)"),
        ({"logits_TE": torch.zeros(6, 4097)}, r"E ≤ 4096 .* found \(6, 4097\)"),
        ({"logits_TE": LOGITS.to("meta")}, "on one device, .* on meta and"),
        ({"expert_TK": EXPERT.long()}, r"experts \(T, K\) of torch.int32 .* and \(6, 2\) of torch.int64"),
        ({"expert_TK": EXPERT[:, :0]}, r"1 ≤ K .* and \(6, 0\)"),
        ({"expert_TK": torch.zeros(6, 5, dtype=torch.int32)}, r"K ≤ E .* and \(6, 5\)"),
        ({"expert_TK": EXPERT[:, 0]}, r"and \(6,\) of"),
        (
            {
                "logits_TE": torch.empty(1 << 26, 64, device="meta"),
                "expert_TK": torch.empty(1 << 26, 32, dtype=torch.int32, device="meta"),
            },
            r"T·K < 2\^31",
        ),
        ({"n_sequences": 4}, "found 6 tokens of 4 sequences: give whole sequences"),
        ({"n_sequences": 0}, "found 6 tokens of 0 sequences"),
        ({"logits_TE": LOGITS[:0], "expert_TK": EXPERT[:0]}, "found 0 tokens of 3 sequences"),
    ],
)
def test_refuses(changed: dict[str, Any], message: str) -> None:
    from nmoe.kernels.native.balance_triton import balance_loss

    with pytest.raises(ShapeError, match=message):
        balance_loss(**({"logits_TE": LOGITS, "expert_TK": EXPERT, "n_sequences": 3, "weight": 0.5} | changed))


class TestOnGpu:
    pytestmark = pytest.mark.gpu

    @staticmethod
    def run(logits: torch.Tensor, expert: torch.Tensor, sequences: int) -> dict[str, torch.Tensor]:
        from nmoe.kernels.native.balance_triton import balance_loss

        loss = balance_loss(logits, expert, n_sequences=sequences, weight=WEIGHT)
        (dlogits,) = torch.autograd.grad(loss, logits, torch.full_like(loss, DLOSS))
        return {"loss": loss.detach(), "dlogits": dlogits}

    @staticmethod
    def operands(gpu: str, name: str) -> tuple[torch.Tensor, torch.Tensor, int]:
        case = draw(name)
        logits, expert = (torch.from_numpy(case[key]).to(gpu) for key in ("logits", "expert"))
        return logits.requires_grad_(), expert, int(case["sequences"])

    @pytest.mark.parametrize("name", GPU_SHAPES)
    def test_equals_float64(self, gpu: str, name: str) -> None:
        """And the same bits again, on memory that held something else."""
        logits, expert, sequences = self.operands(gpu, name)
        poison = [torch.full_like(logits, torch.nan) for _ in range(4)]
        del poison  # the allocator gives it again: an element that is not written must not look right
        found = self.run(logits, expert, sequences)
        expected = exact(draw(name))
        assert near({key: value.cpu() for key, value in found.items()}, expected) == {"loss": True, "dlogits": True}
        for _ in range(5):
            again = self.run(logits, expert, sequences)
            assert all(torch.equal(again[key], value) for key, value in found.items())

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
