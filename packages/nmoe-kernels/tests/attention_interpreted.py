"""Runs the Triton kernels of attention in the interpreter: `TRITON_INTERPRET=1 python …_interpreted.py IN OUT`.

A case has `q`, `k`, `v` and `dout`, fp32 of bf16's values in (B, H, S, ·); `scale` and `window`; `layout`, which says
how they lie in memory (see `laid_out`); and, if it has documents, `start`, those of (B, S). Results: `out` and the
gradients `dq`, `dk` and `dv` as fp32, and `strides`, those of all four.
"""

import numpy as np
import torch
from grouped_gemm_interpreted import teach_bf16
from interpreted import run_cases
from nmoe.kernels.native.attention import attend


def laid_out(x_BHSd: torch.Tensor, layout: str) -> torch.Tensor:
    """The same numbers: `BSHd` and `BHSd` are orders in memory; `part` is a part of wider rows, with no numbers beside
    it, that starts at a multiple of 16 bytes, and `odd` one that does not."""
    if layout == "BHSd":
        return x_BHSd.contiguous()
    x_BSHd = x_BHSd.transpose(1, 2).contiguous()
    if layout != "BSHd":
        before = {"part": 24, "odd": 3}[layout]
        x_BSHd = torch.nn.functional.pad(x_BSHd, (before, 32 - before), value=float("nan"))[..., before : before - 32]
    return x_BSHd.transpose(1, 2)


def run(case: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Output and gradients of one case."""
    layout = str(case["layout"])
    given, dout = (
        [laid_out(torch.from_numpy(case[name]).bfloat16(), layout) for name in names]
        for names in (("q", "k", "v"), ("dout",))
    )
    given = [tensor.requires_grad_() for tensor in given]
    start = torch.from_numpy(case["start"]) if "start" in case else None
    out = attend(*given, scale=float(case["scale"]), window=int(case["window"]), document_start_BS=start)
    found = (out, *torch.autograd.grad(out, given, dout))
    named = zip(("out", "dq", "dk", "dv"), found, strict=True)
    results = {name: tensor.detach().float().contiguous().numpy() for name, tensor in named}
    return results | {"strides": np.array([tensor.stride() for tensor in found])}


if __name__ == "__main__":
    teach_bf16()
    run_cases(run)
