"""What cross-entropy does between its matrix products, in two reads of the logits and one write of their gradient: for
rows that `cross_entropy_cuda`, which reads them once, does not take.

One program scores a row. Each of its lanes keeps a maximum and a sum of exponentials of its own, one exponential an
element (online softmax, https://arxiv.org/abs/1805.02867), so that only the end of a row waits for other lanes. One
order of every sum: same inputs, same bits.

Shapes: C rows of a chunk, V vocabulary.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from nmoe.kernels.errors import ShapeError
from nmoe.kernels.reference.cross_entropy import IGNORE
from nmoe.kernels.runtime.triton_aot import TritonKernel

_IGNORE = tl.constexpr(IGNORE)
_LOWEST = tl.constexpr(-3.4028234663852886e38)  # of fp32; unlike -inf, it can be taken from -inf
_SIZES = {"BLOCK": 4096}
_OPTIONS: dict[str, Any] = {"num_warps": 8, "enable_fp_fusion": False}  # said, since Triton 3.10 changes the default


@triton.jit
def _score_rows_kernel(
    logits_ptr, target_ptr, nll_ptr, dlogits_ptr, vocab, WITH_GRAD: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * vocab
    dlogits_ptr += row * vocab
    target = tl.load(target_ptr + row)
    lane = tl.arange(0, BLOCK)
    if target == _IGNORE:
        tl.store(nll_ptr + row, 0.0)
        if WITH_GRAD:
            nothing = tl.zeros((BLOCK,), dlogits_ptr.dtype.element_ty)
            for start in range(0, vocab, BLOCK):
                tl.store(dlogits_ptr + start + lane, nothing, mask=start + lane < vocab)
    else:
        peak_lane = tl.full((BLOCK,), _LOWEST, tl.float32)
        total_lane = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, vocab, BLOCK):
            logit = tl.load(logits_ptr + start + lane, mask=start + lane < vocab, other=float("-inf"))
            rise = logit - peak_lane
            ratio = tl.exp(-tl.abs(rise))
            # A NaN rises above nothing and ends in the total, whatever follows.
            total_lane = tl.where(rise > 0, total_lane * ratio + 1, total_lane + ratio)
            peak_lane = tl.where(rise > 0, logit, peak_lane)
        peak = tl.max(peak_lane, 0)
        total = tl.sum(total_lane * tl.exp(peak_lane - peak), 0)
        # No id of the vocabulary: NaN, rather than what stands elsewhere in memory.
        aim = tl.load(logits_ptr + target, mask=(target >= 0) & (target < vocab), other=float("nan"))
        tl.store(nll_ptr + row, tl.log(total) + (peak - aim))
        if WITH_GRAD:
            share = 1 / total
            aimed_at = target.to(tl.int32)
            for start in range(0, vocab, BLOCK):
                inside = start + lane < vocab
                logit = tl.load(logits_ptr + start + lane, mask=inside, other=float("-inf"))
                dlogit = tl.exp(logit - peak) * share
                dlogit = tl.where(start + lane == aimed_at, dlogit - 1, dlogit)
                tl.store(dlogits_ptr + start + lane, dlogit.to(dlogits_ptr.dtype.element_ty), mask=inside)


def score_rows(
    logits_CV: torch.Tensor, target_C: torch.Tensor, nll_C: torch.Tensor, dlogits_CV: torch.Tensor | None
) -> None:
    """`-log softmax(logits)[target]` of each row, and its gradient; the loss is NaN where a logit is NaN or +inf.

    Args:
        logits_CV: fp32, contiguous; left as they are.
        target_C: int64 ids below V, contiguous, or -100; the loss of any other is NaN.
        nll_C: fp32, contiguous, written; 0 where the target is -100, whose logits are not read.
        dlogits_CV: None, or bf16, contiguous: softmax less one-hot is written, and 0 where the target is -100.

    Raises:
        ShapeError: a shape, dtype, device or layout is not as above.
    """
    check_rows(logits_CV, target_C, nll_C, dlogits_CV)
    rows, vocab = logits_CV.shape
    if rows == 0:
        return
    with torch.cuda.device_of(logits_CV):
        _score_rows_kernel[(rows,)](
            logits_CV,
            target_C,
            nll_C,
            logits_CV if dlogits_CV is None else dlogits_CV,
            vocab,
            WITH_GRAD=dlogits_CV is not None,
            **_SIZES,
            **_OPTIONS,
        )


def check_rows(
    logits_CV: torch.Tensor, target_C: torch.Tensor, nll_C: torch.Tensor, dlogits_CV: torch.Tensor | None
) -> None:
    """That these are what `score_rows` takes.

    Raises:
        ShapeError: a shape, dtype, device or layout is not as there.
    """
    rows, vocab = logits_CV.shape
    _require("logits", logits_CV, (rows, vocab), torch.float32, logits_CV)
    _require("target", target_C, (rows,), torch.int64, logits_CV)
    _require("nll", nll_C, (rows,), torch.float32, logits_CV)
    if dlogits_CV is not None:
        _require("dlogits", dlogits_CV, (rows, vocab), torch.bfloat16, logits_CV)


def _require(name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, beside: torch.Tensor) -> None:
    if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous() or tensor.device != beside.device:
        raise ShapeError(
            f"expected {name} {shape} of {dtype}, contiguous, on {beside.device}; found {tuple(tensor.shape)} of "
            f"{tensor.dtype} with strides {tensor.stride()} on {tensor.device}: give the head bf16 rows and int64 "
            "targets, contiguous, or set runtime.kernels = 'reference'"
        )


def _ahead(name: str, with_grad: bool) -> TritonKernel:
    types = {
        "logits_ptr": "*fp32",
        "target_ptr": "*i64",
        "nll_ptr": "*fp32",
        "dlogits_ptr": "*bf16" if with_grad else "*fp32",
        "vocab": "i32",
    }
    return TritonKernel(
        name,
        __name__,
        "_score_rows_kernel",
        ("sm_90a", "sm_100a"),
        tuple(types.items()),
        constants=(("WITH_GRAD", with_grad), *_SIZES.items()),
        aligned=tuple(types),
        options=tuple(_OPTIONS.items()),
    )


TRITON_KERNELS = (_ahead("score_rows", False), _ahead("score_rows_grad", True))
"""What is compiled ahead: for vocabularies of multiples of 16."""
