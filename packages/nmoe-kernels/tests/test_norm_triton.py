"""The Triton RMSNorm's kernels: what is compiled ahead, and to what."""

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is for Linux")
from nmoe.kernels.native import norm_triton as module


def test_what_is_compiled_ahead_is_what_is_launched(launches_of: Any) -> None:
    kinds = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}
    launched = set()

    def note(name: str, kernel: Any) -> None:
        types = tuple(
            kinds[a.dtype] if isinstance(a, torch.Tensor) else "fp32" if isinstance(a, float) else "i32"
            for a in kernel.args
        )
        launched.add((name, types, frozenset(kernel.options.items())))

    for width, add in [(width, False) for width in (512, 768, 2048)] + [(768, True), (2048, True)]:
        kernel = launches_of(module, "_norm_kernel")
        x, weight = torch.zeros(4, width).bfloat16(), torch.ones(width).bfloat16()
        module.forward(x, x if add else None, weight, torch.empty_like(x) if add else None, torch.empty_like(x), 1e-6)
        note("_norm_kernel", kernel)
    for add in (False, True):
        kernel = launches_of(module, "_norm_backward_kernel")
        x, weight = torch.zeros(4, 128).bfloat16(), torch.ones(128).bfloat16()
        module.backward(x, x if add else None, x, torch.zeros(4), weight, torch.empty_like(x), False)
        note("_norm_backward_kernel", kernel)
    listed = {
        (k.function, tuple(kind for _, kind in k.signature), frozenset((*k.constants, *k.options)))
        for k in module.TRITON_KERNELS
    }
    assert launched == listed


def catalog() -> list[Any]:
    return [
        pytest.param(kernel, arch, id=f"{kernel.name}-{arch}")
        for kernel in module.TRITON_KERNELS
        if dict(kernel.constants)["WIDTH"] != 512  # as 1024
        for arch in kernel.arches
    ]


@pytest.mark.parametrize(("kernel", "arch"), catalog())
def test_compiles_to_loads_of_16_bytes(kernel: Any, arch: str, ahead: Any) -> None:
    """Of all rows, and no fused multiply-add."""
    compiled = ahead.triton(kernel, arch)
    assert not compiled.resources.spills
    text = ahead.ptx(kernel, compiled)
    constants = dict(kernel.constants)
    backward = kernel.function == "_norm_backward_kernel"
    tensors = (2 if backward else 1) + constants["ADD"]
    each = 4 if not backward else 2 * 4  # the first rows, and the next ones
    assert text.count("ld.global.v4.b32") >= tensors * each
    assert text.count("st.global.v4.b32") >= (4 if backward else 4 * (1 + constants["ADD"]))
    assert "fma.rn" not in text
