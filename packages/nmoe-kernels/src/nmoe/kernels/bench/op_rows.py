"""Cases of the ops that memory bounds: norms, positions, SwiGLU, and what stands around the experts' products.

Shapes: T tokens or rows, D width, B batch, S positions, H heads, d head width, n width without position, r RoPE width,
v value width, F hidden width, E experts, K experts per token, R = T·K routed rows, N partial sums of a gate's gradient.
"""

from collections.abc import Callable

import torch
from nmoe.kernels.bench.op_case import BF16, FP32, INT32, Case, Make, Run, Setting, Work, backward

_MakePart = Callable[[Setting, str], Run]

_EPS = 1e-5
_COMBINE_TILE = 128
"""Columns of F that share a partial sum of a gate's gradient, in the experts' product before it."""


def launch() -> Case:
    """One kernel that does nothing: what any op takes at least, however few bytes it moves."""

    def make(setting: Setting) -> Run:
        return lambda: torch.cuda._sleep(0)

    return Case("launch", "empty kernel", "1 block", Work(0), make)


def rms_norm(tokens: int, width: int) -> list[Case]:
    """Rows of `width`; the gain's gradient to its fp32 `main_grad`."""
    elements = tokens * width

    def make(setting: Setting, part: str) -> Run:
        x_TD, gain_D = setting.leaf(tokens, width), setting.weight(width)
        if part == "forward":
            return lambda: setting.ops.rms_norm(x_TD, gain_D, _EPS)
        return backward(setting.ops.rms_norm(x_TD, gain_D, _EPS), (x_TD, gain_D), setting.normal(tokens, width))

    # Forward: x and gain read, the normed x written. Backward: x, its output's gradient and gain read, dx and the
    # gain's gradient written.
    works = {
        "forward": Work(2 * BF16 * elements + BF16 * width),
        "backward": Work(3 * BF16 * elements + (BF16 + FP32) * width),
    }
    return [Case("rms_norm", part, f"{tokens}x{width}", work, _of(make, part)) for part, work in works.items()]


def add_rms_norm(tokens: int, width: int) -> list[Case]:
    """A residual's addition and the norm that follows; the gain's gradient to its fp32 `main_grad`."""
    elements = tokens * width

    def make(setting: Setting, part: str) -> Run:
        x_TD, delta_TD, gain_D = setting.leaf(tokens, width), setting.leaf(tokens, width), setting.weight(width)
        if part == "forward":
            return lambda: setting.ops.add_rms_norm(x_TD, delta_TD, gain_D, _EPS)
        outputs = setting.ops.add_rms_norm(x_TD, delta_TD, gain_D, _EPS)
        gradients = [setting.normal(tokens, width) for _ in outputs]
        return backward(outputs, (x_TD, delta_TD, gain_D), gradients)

    # Forward: x, what is added and gain read, sum and norm written. Backward: the sum, both outputs' gradients and gain
    # read, one gradient, which is x's and the other's, and the gain's written.
    works = {
        "forward": Work(4 * BF16 * elements + BF16 * width),
        "backward": Work(4 * BF16 * elements + (BF16 + FP32) * width),
    }
    return [Case("add_rms_norm", part, f"{tokens}x{width}", work, _of(make, part)) for part, work in works.items()]


def qkv_heads(batch: int, length: int, heads: int, width: int) -> list[Case]:
    """Plain attention's product, queries and keys normed; gradients lie in memory as (B, S, H, d)."""

    def make(setting: Setting, part: str) -> Run:
        qkv_BS3Hd = setting.leaf(batch, length, 3, heads, width)
        gains, tables = (setting.weight(width), setting.weight(width)), _tables(setting, length, width)
        if part == "forward":
            return lambda: setting.ops.qkv_heads(qkv_BS3Hd, gains, _EPS, *tables)
        outputs = setting.ops.qkv_heads(qkv_BS3Hd, gains, _EPS, *tables)
        gradients = [setting.normal(batch, length, heads, width).transpose(1, 2) for _ in outputs]
        return backward(outputs, (qkv_BS3Hd, *gains), gradients)

    elements = batch * length * heads * width
    shared = 2 * FP32 * length * (width // 2) + 2 * BF16 * width  # tables and gains
    works = {
        # Queries and keys read and written; values stay where they are.
        "forward": Work(4 * BF16 * elements + shared),
        # Three gradients, queries and keys read; the product's gradient, of three, and the gains' written.
        "backward": Work(8 * BF16 * elements + shared + 2 * FP32 * width),
    }
    shape = f"{batch}x{length}x3x{heads}x{width}"
    return [Case("qkv_heads", part, shape, work, _of(make, part)) for part, work in works.items()]


def rope(batch: int, length: int, heads: int, width: int) -> list[Case]:
    """(B, S, H, d), all of d turned."""

    def make(setting: Setting, part: str) -> Run:
        x_BSHd = setting.leaf(batch, length, heads, width)
        cos, sin = _tables(setting, length, width)
        if part == "forward":
            return lambda: setting.ops.rope(x_BSHd, cos, sin)
        return backward(setting.ops.rope(x_BSHd, cos, sin), (x_BSHd,), setting.normal(*x_BSHd.shape))

    # Both ways: heads read and written, cos and sin (S, d/2) read.
    work = Work(2 * BF16 * batch * length * heads * width + 2 * FP32 * length * (width // 2))
    shape = f"{batch}x{length}x{heads}x{width}"
    return [Case("rope", part, shape, work, _of(make, part)) for part in ("forward", "backward")]


def mla_heads(batch: int, length: int, heads: int, nope: int, rope: int, value: int) -> list[Case]:
    """MLA's queries, keys and values; gradients lie in memory as (B, S, H, ·), as the op's own outputs do."""

    def make(setting: Setting, part: str) -> Run:
        q_BSHd = setting.leaf(batch, length, heads, nope + rope)
        kv_BSHx = setting.leaf(batch, length, heads, nope + value)
        k_rope_BSr = setting.leaf(batch, length, rope)
        tables = _tables(setting, length, rope)
        if part == "forward":
            return lambda: setting.ops.mla_heads(q_BSHd, kv_BSHx, k_rope_BSr, *tables)
        outputs = setting.ops.mla_heads(q_BSHd, kv_BSHx, k_rope_BSr, *tables)
        widths = (nope + rope, nope + rope, value)
        gradients = [setting.normal(batch, length, heads, width).transpose(1, 2) for width in widths]
        return backward(outputs, (q_BSHd, kv_BSHx, k_rope_BSr), gradients)

    per_token = {
        # q and the keys' own part read, q and k written; values stay where they are.
        "forward": heads * ((nope + rope) + nope + 2 * (nope + rope)),
        # dq, dk and dv read, dq and the expansion's gradient (n + v) written.
        "backward": heads * (2 * (nope + rope) + value + (nope + rope) + (nope + value)),
    }
    tables = 2 * FP32 * length * (rope // 2)
    shape = f"{batch}x{length}x{heads}x{nope}+{rope},{value}"
    return [
        # The shared key (r) is read forward, its gradient written backward.
        Case("mla_heads", part, shape, Work(BF16 * batch * length * (count + rope) + tables), _of(make, part))
        for part, count in per_token.items()
    ]


def swiglu(tokens: int, hidden: int) -> list[Case]:
    """(T, 2F) to (T, F)."""

    def make(setting: Setting, part: str) -> Run:
        pre_T2F = setting.leaf(tokens, 2 * hidden)
        if part == "forward":
            return lambda: setting.ops.swiglu(pre_T2F)
        return backward(setting.ops.swiglu(pre_T2F), (pre_T2F,), setting.normal(tokens, hidden))

    # Forward: gate and up read, one written. Backward: gate, up and the output's gradient read, two written.
    works = {"forward": Work(3 * BF16 * tokens * hidden), "backward": Work(5 * BF16 * tokens * hidden)}
    return [Case("swiglu", part, f"{tokens}x2x{hidden}", work, _of(make, part)) for part, work in works.items()]


def route(tokens: int, n_experts: int, top_k: int) -> list[Case]:
    """Logits to gates and to the rows' order; backward from the gates' gradient to the logits'."""

    def make(setting: Setting, part: str) -> Run:
        logits_TE = setting.leaf(tokens, n_experts, dtype=torch.float32)
        bias_E = torch.zeros(n_experts, device=setting.device)

        def forward() -> tuple[object, object]:
            routing = setting.ops.route(logits_TE, bias_E, top_k=top_k)
            return routing, setting.ops.index_rows(routing, n_experts)

        if part == "forward + index":
            return forward
        gate_TK = setting.ops.route(logits_TE, bias_E, top_k=top_k).gate_TK
        return backward(gate_TK, (logits_TE,), setting.normal(tokens, top_k, dtype=torch.float32))

    rows = tokens * top_k
    works = {
        # Logits and bias read; each row's expert, gate, and score for the backward written, its order, token and place,
        # and the experts' offsets.
        "forward + index": Work(
            FP32 * n_experts * (tokens + 1) + (INT32 + 2 * FP32) * rows + 3 * INT32 * rows + INT32 * (n_experts + 1)
        ),
        # Each row's gradient, expert and score read, all logits' gradients written.
        "backward": Work((2 * FP32 + INT32) * rows + FP32 * tokens * n_experts),
    }
    shape = f"{tokens}x{n_experts},{top_k}"
    return [Case("route", part, shape, work, _of(make, part)) for part, work in works.items()]


def balance_loss(tokens: int, n_experts: int, top_k: int, sequences: int) -> list[Case]:
    """Logits and chosen experts to one loss of all sequences; backward from the loss's gradient to the logits'."""

    def make(setting: Setting, part: str) -> Run:
        logits_TE = setting.leaf(tokens, n_experts, dtype=torch.float32)
        bias_E = torch.zeros(n_experts, device=setting.device)
        expert_TK = setting.ops.route(logits_TE.detach(), bias_E, top_k=top_k).expert_TK

        def forward() -> torch.Tensor:
            return setting.ops.balance_loss(logits_TE, expert_TK, n_sequences=sequences, weight=1.0)

        if part == "forward":
            return forward
        return backward(forward(), (logits_TE,), torch.ones((), device=setting.device))

    # Forward: logits and experts read, the loss written. Backward: the loss's gradient and logits read, the logits'
    # gradients written; how often each expert was chosen is the forward's to keep.
    works = {
        "forward": Work(FP32 * tokens * n_experts + INT32 * tokens * top_k + FP32),
        "backward": Work(FP32 + 2 * FP32 * tokens * n_experts),
    }
    shape = f"{sequences}x{tokens // sequences}x{n_experts},{top_k}"
    return [Case("balance_loss", part, shape, work, _of(make, part)) for part, work in works.items()]


def combine(tokens: int, width: int, hidden: int, n_experts: int, top_k: int) -> list[Case]:
    """A token's rows summed; backward the same for the input's gradient, beside the sums of the gates' gradients.

    Of the native tier alone: in the reference it is no op of its own.
    """
    partials = -(-hidden // _COMBINE_TILE)

    def make(setting: Setting, part: str) -> Run:
        from nmoe.kernels.native.combine_cuda import combine, combine_backward

        logits_TE = setting.normal(tokens, n_experts, dtype=torch.float32)
        routing = setting.ops.route(logits_TE, torch.zeros(n_experts, device=setting.device), top_k=top_k)
        row_TK = setting.ops.index_rows(routing, n_experts).row_TK
        y_RD = setting.normal(tokens * top_k, width)
        if part == "forward":
            return lambda: combine(y_RD, row_TK)
        partial_NR = setting.normal(partials, tokens * top_k, dtype=torch.float32)
        return lambda: combine_backward(y_RD, row_TK, partial_NR)

    rows = tokens * top_k
    # Rows and their places read, one row a token written.
    forward = BF16 * rows * width + INT32 * rows + BF16 * tokens * width
    # As forward; and N partial sums read for each row, one gradient written.
    works = {"forward": Work(forward), "backward": Work(forward + FP32 * rows * (partials + 1))}
    shape = f"{tokens}x{width},{top_k} of {n_experts}"
    return [Case("combine", part, shape, work, _of(make, part)) for part, work in works.items()]


def _of(make: _MakePart, part: str) -> Make:
    return lambda setting: make(setting, part)


def _tables(setting: Setting, length: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    angle = setting.normal(length, width // 2, dtype=torch.float32)
    return angle.cos(), angle.sin()
