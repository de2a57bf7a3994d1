"""Which cases `ops` measures: the hot ops of a training step at the sizes of the shipped configurations.

moonlet has micro-batches of 4 x 4096 tokens, D = 2048, V = 201,088 and 16 MLA heads of 128 + 64 and 128; super has
32 x 2048 tokens, D = 768, V = 50,304 and 12 heads of 64.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from nmoe.kernels.bench.op_attention import attention
from nmoe.kernels.bench.op_case import Case
from nmoe.kernels.bench.op_cross_entropy import linear_cross_entropy
from nmoe.kernels.bench.op_optimizer import adamw, global_norm, newton_schulz
from nmoe.kernels.bench.op_rows import (
    add_rms_norm,
    balance_loss,
    combine,
    launch,
    mla_heads,
    qkv_heads,
    rms_norm,
    rope,
    route,
    swiglu,
)

CASES: Mapping[str, Callable[[], Sequence[Case]]] = {
    "launch": lambda: [launch()],
    "rms_norm": lambda: [
        *rms_norm(16_384, 2048),
        *rms_norm(65_536, 768),
        *rms_norm(16_384, 512),  # moonlet's latents
    ],
    "add_rms_norm": lambda: [*add_rms_norm(16_384, 2048), *add_rms_norm(65_536, 768)],
    "qkv_heads": lambda: qkv_heads(32, 2048, 12, 64),
    "rope": lambda: rope(4, 4096, 1, 64),  # moonlet's key that all heads share
    "mla_heads": lambda: mla_heads(4, 4096, 16, 128, 64, 128),
    "swiglu": lambda: [
        *swiglu(16_384, 11_264),  # moonlet's dense layer
        *swiglu(16_384, 2816),  # its shared experts
        *swiglu(65_536, 384),  # super's
    ],
    "linear_cross_entropy": lambda: [
        *linear_cross_entropy(16_384, 2048, 201_088, chunk=2048),
        *linear_cross_entropy(65_536, 768, 50_304, chunk=8192),
    ],
    "route": lambda: [*route(16_384, 64, 6), *route(65_536, 256, 7)],
    "balance_loss": lambda: [*balance_loss(16_384, 64, 6, 4), *balance_loss(65_536, 256, 7, 32)],
    "combine": lambda: [*combine(16_384, 2048, 1408, 64, 6), *combine(65_536, 768, 384, 256, 7)],
    "attention": lambda: [
        *attention(4, 16, 4096, 192, 128),
        *attention(8, 16, 4096, 192, 128),
        *attention(32, 12, 2048, 64, 64),
        *attention(32, 6, 2048, 128, 128),
    ],
    "window_attention": lambda: [
        *attention(8, 16, 4096, 128, 128, 128),
        *attention(8, 16, 4096, 192, 128, 512),
        *attention(32, 12, 2048, 64, 64, 128),
        *attention(32, 12, 2048, 64, 64, 512),
    ],
    "document_attention": lambda: [
        *attention(8, 16, 4096, 192, 128, mean_document=512),
        *attention(8, 16, 4096, 192, 128, 512, mean_document=512),
        *attention(32, 12, 2048, 64, 64, mean_document=512),
        *attention(32, 6, 2048, 128, 128, mean_document=512),
    ],
    "adamw": lambda: [adamw(1_000_000_000, torch.bfloat16), adamw(300_000_000, torch.float32)],
    "global_norm": lambda: [global_norm(2_000_000_000, 8)],
    "newton_schulz": lambda: [newton_schulz(128, 1408, 2048), newton_schulz(24, 768, 768)],
}
"""By the op's name, as `--ops` takes it."""

OPS = tuple(CASES)


def cases_of(names: Sequence[str]) -> list[Case]:
    """In the order of `CASES`."""
    return [case for name, make in CASES.items() if name in names for case in make()]
