"""`python -m nmoe.kernels.selftest`: every op, and a whole MoE layer, against float64 on the CPU.

On a GPU of `nmoe.kernels.arch.NATIVE_ARCHES` the native tier, elsewhere the reference on the CPU; prints what ran, each
error beside its bound, and what was skipped and why. Exit code 0: all within bounds; 1: not; 2: wrong arguments.

An error is the norm of the difference over the norm of the exact value. Native ops take and give bf16, which rounds by
2⁻⁸ relative: a bound is as many roundings as lie one after another on the longest way. The reference runs in fp32, and
may lose 2⁻²⁰ where bf16 loses 2⁻⁸: sixteen roundings of 2⁻²⁴, for sums of some hundred terms.

Shapes: T tokens, D model width, F expert width, E experts, K experts per token; V vocabulary.
"""

import argparse
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from nmoe.kernels.arch import NATIVE_ARCHES, detect_arch
from nmoe.kernels.linear import linear
from nmoe.kernels.ops import Ops, select_ops
from nmoe.kernels.reference.adamw import adamw_scalars
from nmoe.kernels.reference.master import join_master, split_master
from nmoe.kernels.reference.newton_schulz import COEFFICIENTS, EPS
from nmoe.kernels.router import router_logits

_TOKENS, _WIDTH, _HIDDEN, _EXPERTS, _TOP_K = 333, 128, 192, 9, 3
_EPS = 1e-2
"""Of norms: so large that its place in the formula shows."""
_NAMES = ("out", "dx", "drouter", "dw13", "dw2")


@dataclass(frozen=True)
class Finding:
    """One comparison."""

    what: str
    error: float
    bound: float

    @property
    def passed(self) -> bool:
        """Whether the error is within its bound; NaN is not."""
        return self.error <= self.bound


@dataclass(frozen=True)
class Setting:
    """What is checked, where, and in which precision."""

    ops: Ops
    device: str
    dtype: torch.dtype
    rounding: float
    """Relative, of one step."""

    def normal(self, *sizes: int, scale: float = 1.0) -> torch.Tensor:
        """Random numbers in the tier's precision, the same on every device."""
        return (torch.randn(*sizes) * scale).to(self.dtype).to(self.device)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; gives its exit code."""
    argparse.ArgumentParser(prog="python -m nmoe.kernels.selftest", description=__doc__).parse_args(argv)
    setting, skipped = choose_setting()
    where = torch.cuda.get_device_name() if setting.device == "cuda" else "CPU"
    print(f"{setting.ops.tier} tier on {where}, torch {torch.__version__}, against float64 on the CPU")
    failures = 0
    for name, check in CHECKS.items():
        torch.manual_seed(0)
        try:
            findings = list(check(setting))
        except Exception as error:  # one op that fails must not hide the others
            traceback.print_exc()
            print(f"FAIL  {name}: {type(error).__name__}: {error}")
            failures += 1
            continue
        for finding in findings:
            verdict = "ok  " if finding.passed else "FAIL"
            print(f"{verdict}  {name + ' ' + finding.what:34} error {finding.error:.2e}  bound {finding.bound:.2e}")
            failures += not finding.passed
    for line in skipped:
        print(f"skipped: {line}")
    if failures:
        print(
            f"{failures} checks failed: do not train with these ops; set runtime.kernels = 'reference'", file=sys.stderr
        )
    return 1 if failures else 0


def choose_setting() -> tuple[Setting, list[str]]:
    """The native tier where it runs, else the reference on the CPU; and what is left out, with the reason."""
    if not torch.cuda.is_available():
        reason = "found no CUDA GPU"
    elif (arch := detect_arch()) not in NATIVE_ARCHES:
        reason = f"found {arch}, expected one of {', '.join(NATIVE_ARCHES)}"
    else:
        native = Setting(select_ops("native", "cuda"), "cuda", torch.bfloat16, 2.0**-8)
        return native, ["the reference tier: run this with CUDA_VISIBLE_DEVICES= to check it"]
    reference = Setting(select_ops("reference", "cpu"), "cpu", torch.float32, 2.0**-20)
    return reference, [f"the native tier: {reason}"]


def compare(what: str, found: torch.Tensor, exact: torch.Tensor, bound: float) -> Finding:
    """The relative error of the norm."""
    difference = found.detach().double().cpu() - exact.detach()
    return Finding(what, float(difference.norm() / exact.detach().norm().clamp_min(1e-30)), bound)


def _exactly(what: str, wrong: torch.Tensor | bool) -> Finding:
    """Of a property that has no tolerance: the error is the number of violations."""
    return Finding(what, float(torch.as_tensor(wrong).sum()), 0.0)


def _check_router(setting: Setting) -> Iterator[Finding]:
    x_TD = setting.normal(_TOKENS, _WIDTH).requires_grad_()
    weight_ED = torch.randn(_EXPERTS, _WIDTH).to(setting.device).requires_grad_()
    dlogits_TE = torch.randn(_TOKENS, _EXPERTS).to(setting.device)
    logits_TE = router_logits(x_TD, weight_ED)
    dx_TD, dweight_ED = torch.autograd.grad(logits_TE, (x_TD, weight_ED), dlogits_TE)
    x, weight, dlogits = (t.detach().double().cpu() for t in (x_TD, weight_ED, dlogits_TE))
    yield compare("logits", logits_TE, x @ weight.T, 2.0**-19)  # tensor cores truncate as they sum
    yield compare("dx", dx_TD, dlogits @ weight, 3 * setting.rounding)
    yield compare("dweight", dweight_ED, dlogits.T @ x, 2.0**-15)  # the gradient is split in two: 2⁻¹⁷


def _check_routing(setting: Setting) -> Iterator[Finding]:
    logits_TE = (torch.randn(_TOKENS, _EXPERTS) * 2).to(setting.device).requires_grad_()
    bias_E = torch.randn(_EXPERTS).to(setting.device) / 10
    routing = setting.ops.route(logits_TE, bias_E, top_k=_TOP_K)
    index = setting.ops.index_rows(routing, _EXPERTS)
    dgate_TK = torch.randn(_TOKENS, _TOP_K).to(setting.device)
    (dlogits_TE,) = torch.autograd.grad(routing.gate_TK, logits_TE, dgate_TK)

    exact_TE = logits_TE.detach().double().cpu().requires_grad_()
    choice_TE = exact_TE.detach().sigmoid() + bias_E.double().cpu()
    expert_TK = choice_TE.topk(_TOP_K, dim=-1).indices
    yield _exactly("experts", routing.expert_TK.cpu() != expert_TK)
    gate_TK = _gates(exact_TE, expert_TK)
    yield compare("gates", routing.gate_TK, gate_TK, 2.0**-20)
    yield compare("dlogits", dlogits_TE, torch.autograd.grad(gate_TK, exact_TE, dgate_TK.double().cpu())[0], 2.0**-18)

    order_R = torch.sort(expert_TK.flatten(), stable=True).indices
    yield _exactly("row order", index.order_R.cpu() != order_R)
    yield _exactly("rows are its inverse", index.row_TK.flatten().cpu()[order_R] != torch.arange(order_R.numel()))
    counts = torch.bincount(expert_TK.flatten(), minlength=_EXPERTS)
    yield _exactly("offsets", index.offset_E.cpu() != torch.cat([counts.new_zeros(1), counts.cumsum(0)]))


def _check_balance_loss(setting: Setting) -> Iterator[Finding]:
    sequences = 3
    logits_TE = (torch.randn(_TOKENS, _EXPERTS) * 2).to(setting.device).requires_grad_()
    bias_E = torch.zeros(_EXPERTS, device=setting.device)
    expert_TK = setting.ops.route(logits_TE.detach(), bias_E, top_k=_TOP_K).expert_TK
    loss = setting.ops.balance_loss(logits_TE, expert_TK, n_sequences=sequences, weight=0.3)
    (dlogits_TE,) = torch.autograd.grad(loss, logits_TE)

    exact_TE = logits_TE.detach().double().cpu().requires_grad_()
    score_TE = exact_TE.sigmoid()
    share_TE = score_TE / score_TE.sum(1, keepdim=True)
    expected = torch.zeros((), dtype=torch.float64)
    for shares, experts in zip(share_TE.chunk(sequences), expert_TK.long().cpu().chunk(sequences), strict=True):
        counts = torch.bincount(experts.flatten(), minlength=_EXPERTS)
        expected = expected + 0.3 * _EXPERTS / _TOP_K * (counts / len(shares) * shares.mean(0)).sum()
    yield compare("loss", loss, expected, 2.0**-20)
    yield compare("dlogits", dlogits_TE, torch.autograd.grad(expected, exact_TE)[0], 2.0**-18)


def _gates(logits_TE: torch.Tensor, expert_TK: torch.Tensor) -> torch.Tensor:
    chosen_TK = logits_TE.sigmoid().gather(1, expert_TK)
    return chosen_TK / chosen_TK.sum(-1, keepdim=True)


@dataclass
class _Layer:
    """A small MoE layer; expert 0 gets no rows, and the last one more than the others."""

    setting: Setting

    def __post_init__(self) -> None:
        normal, device = self.setting.normal, self.setting.device
        self.x_TD, self.dout_TD = normal(_TOKENS, _WIDTH).requires_grad_(), normal(_TOKENS, _WIDTH)
        self.router_ED = (torch.randn(_EXPERTS, _WIDTH) * _WIDTH**-0.5).to(device).requires_grad_()
        self.w13_e2FD = normal(_EXPERTS, 2, _HIDDEN, _WIDTH, scale=_WIDTH**-0.5).requires_grad_()
        self.w2_eDF = normal(_EXPERTS, _WIDTH, _HIDDEN, scale=_HIDDEN**-0.5).requires_grad_()
        self.bias_E = torch.zeros(_EXPERTS, device=device)
        self.bias_E[0], self.bias_E[-1] = -9, 0.3
        for weight in (self.w13_e2FD, self.w2_eDF):
            weight.main_grad = torch.full(weight.shape, torch.nan, device=device)  # type: ignore[attr-defined]

    def step(self, stale: bool) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Output, the gradients, and the experts chosen (T, K). `stale`: what weight gradients hold is overwritten."""
        ops, weights = self.setting.ops, (self.w13_e2FD, self.w2_eDF)
        for weight in weights:
            weight.main_grad_stale = stale  # type: ignore[attr-defined]
        routing = ops.route(router_logits(self.x_TD, self.router_ED), self.bias_E, top_k=_TOP_K)
        out_TD = ops.experts(self.x_TD, ops.index_rows(routing, _EXPERTS), routing.gate_TK, *weights)
        inputs = (self.x_TD, self.router_ED, *weights)
        dx_TD, drouter_ED, *_ = torch.autograd.grad(out_TD, inputs, self.dout_TD, allow_unused=True)
        accumulated = [weight.main_grad.clone() for weight in weights]  # type: ignore[attr-defined]
        return [out_TD.detach(), dx_TD, drouter_ED, *accumulated], routing.expert_TK.long().cpu()

    def exact(self, expert_TK: torch.Tensor) -> list[torch.Tensor]:
        """The same in float64 with those experts: every expert for every token, then a choice, by autograd."""
        inputs = [
            t.detach().double().cpu().requires_grad_() for t in (self.x_TD, self.router_ED, self.w13_e2FD, self.w2_eDF)
        ]
        x_TD, router_ED, w13_e2FD, w2_eDF = inputs
        gate_TeF, up_TeF = torch.einsum("td,ecfd->ctef", x_TD, w13_e2FD)
        y_TeD = torch.einsum("tef,edf->ted", torch.nn.functional.silu(gate_TeF) * up_TeF, w2_eDF)
        y_TKD = y_TeD.gather(1, expert_TK[:, :, None].expand(-1, -1, _WIDTH))
        out_TD = (_gates(x_TD @ router_ED.T, expert_TK)[:, :, None] * y_TKD).sum(1)
        return [out_TD.detach(), *torch.autograd.grad(out_TD, inputs, self.dout_TD.double().cpu())]


def _check_layer(setting: Setting) -> Iterator[Finding]:
    layer = _Layer(setting)
    found, expert_TK = layer.step(stale=True)
    exact = layer.exact(expert_TK)
    for name, a, b in zip(_NAMES, found, exact, strict=True):
        yield compare(name, a, b, 6 * setting.rounding)
    yield _exactly("no rows, no gradient", torch.stack([g[0].count_nonzero() for g in found[3:]]))

    twice, _ = layer.step(stale=False)
    for name, a, b in zip(_NAMES[3:], twice[3:], exact[3:], strict=True):
        yield compare(f"{name} added", a, 2 * b, 6 * setting.rounding)
    again, _ = layer.step(stale=True)
    for name, a, b in zip(_NAMES, again, found, strict=True):
        yield _exactly(f"{name} bitwise again", a != b)


def _check_attention(setting: Setting, window: int | None) -> Iterator[Finding]:
    sizes = ((2, 4, 200, 192), (2, 4, 200, 192), (2, 4, 200, 128))
    inputs = [setting.normal(*size).requires_grad_() for size in sizes]
    scale = 192**-0.5
    found = [setting.ops.attention(*inputs, scale=scale, window=window)]
    q, k, v = exact = _widened(inputs)
    distance = torch.arange(200)[:, None] - torch.arange(200)
    hidden = (distance < 0) | (distance >= (window or 200))
    expected = [(q @ k.mT * scale).masked_fill(hidden, float("-inf")).softmax(-1) @ v]
    names, roundings = ("out", "dq", "dk", "dv"), (2,) * 4
    yield from _compare_all(setting, names, roundings, found, inputs, expected, exact)


def _check_mla_heads(setting: Setting) -> Iterator[Finding]:
    sizes = ((2, 50, 3, 192), (2, 50, 3, 256), (2, 50, 64))
    inputs = [setting.normal(*size).requires_grad_() for size in sizes]
    tables = _rope_tables(setting)
    found = setting.ops.mla_heads(*inputs, *tables)
    q, kv, k_rope = exact = _widened(inputs)
    turned = _turned(q[..., 128:], *tables)
    keys = torch.cat((kv[..., :128], k_rope[:, :, None].expand(-1, -1, 3, -1)), -1)
    expected = [t.transpose(1, 2) for t in (torch.cat((q[..., :128], turned), -1), keys, kv[..., 128:])]
    names, roundings = ("q", "k", "v", "dq", "dkv", "dk_rope"), (1,) * 6
    yield from _compare_all(setting, names, roundings, found, inputs, expected, exact)


def _check_qkv_heads(setting: Setting) -> Iterator[Finding]:
    inputs = [setting.normal(*size).requires_grad_() for size in ((2, 50, 3, 5, 64), (64,), (64,))]
    tables = _rope_tables(setting)
    found = setting.ops.qkv_heads(inputs[0], (inputs[1], inputs[2]), _EPS, *tables)
    qkv, q_gain, k_gain = exact = _widened(inputs)
    q, k, v = qkv.unbind(2)
    turned = [_turned(_normed(x, gain), *tables) for x, gain in ((q, q_gain), (k, k_gain))]
    expected = [t.transpose(1, 2) for t in (*turned, v)]
    names, roundings = ("q", "k", "v", "dqkv", "dq_gain", "dk_gain"), (1, 1, 0, 1, 1, 1)
    yield from _compare_all(setting, names, roundings, found, inputs, expected, exact)


def _check_rope(setting: Setting) -> Iterator[Finding]:
    inputs, tables = [setting.normal(2, 50, 3, 64).requires_grad_()], _rope_tables(setting)
    found = [setting.ops.rope(inputs[0], *tables)]
    exact = _widened(inputs)
    yield from _compare_all(setting, ("out", "dx"), (1, 1), found, inputs, [_turned(exact[0], *tables)], exact)


def _check_rms_norm(setting: Setting) -> Iterator[Finding]:
    inputs = [setting.normal(*size).requires_grad_() for size in ((_TOKENS, _WIDTH), (_WIDTH,))]
    found = [setting.ops.rms_norm(inputs[0], inputs[1], _EPS)]
    exact = _widened(inputs)
    yield from _compare_all(setting, ("out", "dx", "dgain"), (1, 1, 1), found, inputs, [_normed(*exact)], exact)


def _check_add_rms_norm(setting: Setting) -> Iterator[Finding]:
    sizes = ((_TOKENS, _WIDTH), (_TOKENS, _WIDTH), (_WIDTH,))
    inputs = [setting.normal(*size).requires_grad_() for size in sizes]
    found = setting.ops.add_rms_norm(*inputs, _EPS)
    x, delta, gain = exact = _widened(inputs)
    total = x + delta
    # What is normed is the sum as rounded.
    names, roundings = ("sum", "norm", "dx", "ddelta", "dgain"), (1, 2, 2, 2, 2)
    yield from _compare_all(setting, names, roundings, found, inputs, [total, _normed(total, gain)], exact)


def _check_swiglu(setting: Setting) -> Iterator[Finding]:
    inputs = [setting.normal(_TOKENS, 2 * _HIDDEN).requires_grad_()]
    found = [setting.ops.swiglu(*inputs)]
    exact = _widened(inputs)
    gate, up = exact[0].chunk(2, dim=-1)
    yield from _compare_all(setting, ("out", "dpre"), (1, 1), found, inputs, [gate * gate.sigmoid() * up], exact)


def _check_linear(setting: Setting) -> Iterator[Finding]:
    x, weight = setting.normal(3, 111, _WIDTH).requires_grad_(), setting.normal(2, 96, _WIDTH).requires_grad_()
    weight.main_grad = torch.full(weight.shape, torch.nan, device=setting.device)  # type: ignore[attr-defined]
    weight.main_grad_stale = True  # type: ignore[attr-defined]
    dout = setting.normal(3, 111, 192)
    exact = _widened([x, weight])
    expected = exact[0] @ exact[1].flatten(0, 1).T
    dx, dweight = torch.autograd.grad(expected, exact, dout.double().cpu())
    for times, suffix in ((1, ""), (2, " added")):  # the first gradient overwrites, the second is added
        found = linear(x, weight)
        found_dx, _ = torch.autograd.grad(found, (x, weight), dout, allow_unused=True)
        accumulated = weight.main_grad  # type: ignore[attr-defined]
        yield compare(f"out{suffix}", found, expected, setting.rounding)
        yield compare(f"dx{suffix}", found_dx, dx, setting.rounding)
        # In fp32, which tensor cores truncate as they sum.
        yield compare(f"dweight{suffix}", accumulated, times * dweight, min(setting.rounding, 2.0**-15))


def _widened(inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """In float64 on the CPU, for a graph of their own."""
    return [tensor.detach().double().cpu().requires_grad_() for tensor in inputs]


def _rope_tables(setting: Setting) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of 50 positions and 32 pairs."""
    angle = torch.rand(50, 32) * 6
    return angle.cos().to(setting.device), angle.sin().to(setting.device)


def _turned(x_BSHd: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    phases = torch.complex(cos, sin).cpu()[:, None]
    return torch.view_as_real(torch.view_as_complex(x_BSHd.unflatten(-1, (-1, 2))) * phases).flatten(-2)


def _normed(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + _EPS).sqrt() * gain


def _compare_all(
    setting: Setting,
    names: Sequence[str],
    roundings: Sequence[int],
    found: Sequence[torch.Tensor],
    inputs: Sequence[torch.Tensor],
    expected: Sequence[torch.Tensor],
    exact: Sequence[torch.Tensor],
) -> Iterator[Finding]:
    """Outputs, and then the inputs' gradients.

    Args:
        setting: where and how exactly.
        names: of what is compared.
        roundings: of each.
        found: the op's outputs.
        inputs: the op's.
        expected: the outputs in float64.
        exact: the inputs that they were formed of.
    """
    douts = [setting.normal(*tensor.shape) for tensor in expected]
    gradients = torch.autograd.grad(found, inputs, douts)
    expected = [*expected, *torch.autograd.grad(expected, exact, [dout.double().cpu() for dout in douts])]
    for name, steps, a, b in zip(names, roundings, (*found, *gradients), expected, strict=True):
        yield compare(name, a, b, steps * setting.rounding)


def _check_cross_entropy(setting: Setting) -> Iterator[Finding]:
    x, weight = setting.normal(_TOKENS, _WIDTH).requires_grad_(), setting.normal(1000, _WIDTH).requires_grad_()
    target = torch.randint(1000, (_TOKENS,))
    target[::7] = -100
    loss = setting.ops.linear_cross_entropy(x, weight, target.to(setting.device))
    exact = [t.detach().double().cpu().requires_grad_() for t in (x, weight)]
    expected = torch.nn.functional.cross_entropy(exact[0] @ exact[1].T, target, reduction="sum")
    yield compare("loss", loss, expected, 1e-5)
    gradients = zip(torch.autograd.grad(loss, (x, weight)), torch.autograd.grad(expected, exact), strict=True)
    for name, (a, b) in zip(("dx", "dweight"), gradients, strict=True):
        yield compare(name, a, b, 3 * setting.rounding)


def _check_adamw(setting: Setting) -> Iterator[Finding]:
    n, device = 4097, setting.device
    weight, moments = torch.randn(n).to(device), [torch.zeros(n, device=device) for _ in range(2)]
    ok = torch.ones((), dtype=torch.int32, device=device)
    before = weight.double().cpu()
    exact, mean, square = before.clone(), torch.zeros(n).double(), torch.zeros(n).double()
    for step in range(1, 4):
        numbers = adamw_scalars(lr=3e-3, beta1=0.9, beta2=0.95, weight_decay=0.1, step=step)
        scalars, scale = torch.tensor(numbers, device=device), torch.tensor(0.37, device=device)
        grad = torch.randn(n)
        state = (weight, None, grad.to(device), *moments)
        setting.ops.adamw_(*state, scale, ok, scalars, beta1=0.9, beta2=0.95, eps=1e-8)
        scaled = grad.double() * 0.37
        mean, square = mean * 0.9 + scaled * 0.1, square * 0.95 + scaled**2 * 0.05
        update = (mean / (1 - 0.9**step)) / ((square / (1 - 0.95**step)).sqrt() + 1e-8)
        exact = exact * (1 - 3e-4) - 3e-3 * update
    yield compare("weight", weight, exact, 2.0**-21)  # three roundings of 2⁻²⁴ to each weight
    yield compare("change of weight", weight.double().cpu() - before, exact - before, 2.0**-14)


def _check_muon(setting: Setting) -> Iterator[Finding]:
    ops, device, sizes = setting.ops, setting.device, (3, 96, 160)
    ok, scale = torch.ones((), dtype=torch.int32, device=device), torch.tensor(0.37, device=device)
    grad, momentum, master = (torch.randn(sizes) for _ in range(3))
    weight, residual = (tensor.to(device) for tensor in split_master(master))
    given, moved = grad.to(device), momentum.to(device)
    yield compare("norm", ops.global_norm([given, moved]), torch.cat((grad, momentum)).double().norm(), 2.0**-20)

    exact = momentum.double() * 0.95 + grad.double() * 0.37 * 0.05
    ahead = ops.muon_momentum_(given, moved, scale, ok, beta=0.95)
    yield compare("momentum", moved, exact, 2.0**-20)
    yield compare("ahead", ahead, exact * 0.95 + grad.double() * 0.37 * 0.05, setting.rounding)

    update = ops.newton_schulz(ahead, steps=5)
    yield compare("update", update, _five_steps(ahead.double().cpu()), 10 * setting.rounding)

    ops.muon_apply_(weight, residual, update, ok, torch.tensor([0.99, 0.02], device=device))
    applied = master.double() * 0.99 - update.double().cpu() * 0.02
    yield compare("weight", join_master(weight, residual), applied, 2.0**-21)


def _five_steps(matrices: torch.Tensor) -> torch.Tensor:
    """Newton-Schulz by its polynomial of the singular values."""
    u, sigma, vh = torch.linalg.svd(matrices, full_matrices=False)
    sigma = sigma / (sigma.norm(dim=-1, keepdim=True) + EPS)
    a, b, c = COEFFICIENTS
    for _ in range(5):
        sigma = a * sigma + b * sigma**3 + c * sigma**5
    return u * sigma[:, None] @ vh


CHECKS: dict[str, Callable[[Setting], Iterator[Finding]]] = {
    "router": _check_router,
    "routing": _check_routing,
    "balance_loss": _check_balance_loss,
    "layer": _check_layer,
    "rms_norm": _check_rms_norm,
    "add_rms_norm": _check_add_rms_norm,
    "linear": _check_linear,
    "rope": _check_rope,
    "qkv_heads": _check_qkv_heads,
    "mla_heads": _check_mla_heads,
    "attention": partial(_check_attention, window=None),
    "window_attention": partial(_check_attention, window=70),
    "swiglu": _check_swiglu,
    "cross_entropy": _check_cross_entropy,
    "adamw": _check_adamw,
    "muon": _check_muon,
}
"""By op; each draws from the generator that `main` has seeded."""


if __name__ == "__main__":
    raise SystemExit(main())
