"""Cases of linear + cross-entropy: whole, beside its three bare products; and what it does between them.

Shapes: T tokens, D model width, V vocabulary, C rows of a chunk.
"""

import torch
from nmoe.kernels.bench.op_case import BF16, FP32, INT64, Case, Peer, Run, Setting, Work, overwrite
from nmoe.kernels.reference.matmul import mm_wide

MOST_OF_PRODUCTS = 1.15
"""Of the three bare products' time, with o200k's vocabulary and a width of 2048: what lies between them weighs more on
narrower models."""


def linear_cross_entropy(tokens: int, width: int, vocab: int, chunk: int) -> list[Case]:
    """Loss and both gradients; and the rows' kernel alone on `chunk` rows.

    The bare products are of whole matrices, not of chunks, with the op's own dtypes: fp32 logits, bf16 dx, fp32
    gradient of the head. Their dlogits are those of a softmax: power, and so the clock, depends on the numbers.
    """

    def whole(setting: Setting) -> Run:
        x_TD, head_VD, target_T = _inputs(setting, tokens, width, vocab)

        def run() -> tuple[torch.Tensor | None, ...]:
            overwrite((head_VD,))
            loss = setting.ops.linear_cross_entropy(x_TD, head_VD, target_T)
            return torch.autograd.grad(loss, (x_TD, head_VD), allow_unused=True)

        return run

    def products(setting: Setting) -> Run:
        x_TD, head_VD, _ = (tensor.detach() for tensor in _inputs(setting, tokens, width, vocab))
        dlogits_TV = torch.cat([(x @ head_VD.t()).softmax(-1) for x in x_TD.split(chunk)])

        def run() -> tuple[torch.Tensor, torch.Tensor]:
            mm_wide(x_TD, head_VD.t())
            return dlogits_TV @ head_VD, mm_wide(dlogits_TV.t(), x_TD)

        return run

    def rows(setting: Setting) -> Run:
        if setting.ops.tier == "native":
            from nmoe.kernels.native.cross_entropy_cuda import score_rows
        else:
            from nmoe.kernels.reference.cross_entropy import score_rows
        logits_CV = setting.normal(chunk, vocab, dtype=torch.float32)
        target_C = torch.randint(vocab, (chunk,), device=setting.device)
        nll_C, dlogits_CV = logits_CV.new_empty(chunk), torch.empty_like(logits_CV, dtype=torch.bfloat16)
        return lambda: score_rows(logits_CV, target_C, nll_C, dlogits_CV)

    op, shape = "linear_cross_entropy", f"{tokens}x{width}x{vocab}"
    # x, head and targets read; dx and the head's fp32 gradient written. Three products: logits and both gradients.
    moved = 2 * BF16 * tokens * width + (BF16 + FP32) * vocab * width + INT64 * tokens
    work = Work(moved, 3 * 2 * tokens * width * vocab)
    # Logits read, their gradient written; a target read and a loss written for each row.
    between = Work((FP32 + BF16) * chunk * vocab + (INT64 + FP32) * chunk)
    most = MOST_OF_PRODUCTS if width >= 2048 else None
    return [
        Case(op, "both", shape, work, whole, Peer("bare products", products), most_of_peer=most),
        Case(op, "rows", f"{chunk}x{vocab}", between, rows),
    ]


def _inputs(setting: Setting, tokens: int, width: int, vocab: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    target_T = torch.randint(vocab, (tokens,), device=setting.device)
    return setting.leaf(tokens, width), setting.weight(vocab, width), target_T
