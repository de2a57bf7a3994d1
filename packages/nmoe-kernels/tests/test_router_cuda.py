"""The router's product in one pass: refusals and shapes without a GPU; values on a Hopper (`-m gpu`)."""

import ctypes
import functools
from typing import Any

import pytest
import torch
from nmoe.kernels.arch import detect_arch
from nmoe.kernels.errors import ShapeError
from nmoe.kernels.router import router_logits
from nmoe.kernels.runtime.catalog import cuda_sources
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("cuda.bindings", reason="the CUDA kernels are for Linux")
from nmoe.kernels.native import router_cuda
from nmoe.kernels.native.router_cuda import router_product
from nmoe.kernels.native.split_cuda import split

# --- without a GPU ---------------------------------------------------------------------------------------------------

bf16 = functools.partial(torch.empty, device="cuda", dtype=torch.bfloat16)


def test_fake_shapes() -> None:
    with FakeTensorMode():
        logits = router_product(bf16(20, 16), bf16(5, 3, 16))
    assert (logits.shape, logits.dtype, logits.is_contiguous()) == ((20, 5), torch.float32, True)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: router_product(bf16(6, 8).cpu(), bf16(4, 3, 8)), r"x \(T, D\).*CUDA device.*found.*cpu"),
        (lambda: router_product(bf16(6, 8).float(), bf16(4, 3, 8)), r"x \(T, D\).*bfloat16.*found.*float32"),
        (lambda: router_product(bf16(8, 6).T, bf16(4, 3, 8)), r"x \(T, D\), contiguous.*found.*strided"),
        (lambda: router_product(bf16(2, 3, 8), bf16(4, 3, 8)), r"x \(T, D\).*found \(2, 3, 8\)"),
        (lambda: router_product(bf16(6, 8), bf16(4, 3, 8).cpu()), r"parts \(E, 3, D\).*CUDA device.*found.*cpu"),
        (lambda: router_product(bf16(6, 8), bf16(4, 3, 8).float()), r"parts \(E, 3, D\).*bfloat16.*found.*float32"),
        (lambda: router_product(bf16(6, 8), bf16(4, 8)), r"parts \(E, 3, D\).*found \(4, 8\)"),
        (lambda: router_product(bf16(6, 8), bf16(3, 4, 8).transpose(0, 1)), r"parts \(E, 3, D\).*found.*strided"),
        (
            lambda: router_product(bf16(6, 8), bf16(4, 2, 8)),
            r"\(E, 3, 8\) on cuda.*found \(4, 2, 8\).*split the weight",
        ),
        (lambda: router_product(bf16(6, 8), bf16(4, 3, 16)), r"\(E, 3, 8\).*found \(4, 3, 16\).*split the weight"),
        (lambda: router_product(bf16(6, 12), bf16(4, 3, 12)), "multiple of 8, found 12"),
        (lambda: router_product(bf16(6, 0), bf16(4, 3, 0)), "multiple of 8, found 0"),
        (lambda: router_product(bf16(1 << 30, 8), bf16(4, 3, 8)), r"fewer than 2\^30.*smaller batches"),
        (lambda: router_product(bf16(6, 8), bf16(1 << 30, 3, 8)), r"fewer than 2\^30.*found.*1073741824 experts"),
    ],
)
def test_refusals(call: Any, told: str) -> None:
    with FakeTensorMode(), pytest.raises(ShapeError, match=told):
        call()


def test_the_catalogue_lists_both_widths() -> None:
    assert {source.name for source in cuda_sources()} >= {"router_product_64", "router_product_128"}


def test_the_struct_is_as_large_as_in_cpp() -> None:
    """Rounded up to a tensor map's alignment: no launch copies it."""
    assert ctypes.sizeof(router_cuda._RouterParams) == 320


# --- on a Hopper -----------------------------------------------------------------------------------------------------

# T, D and E. The last three have more than two tiles for each of 132 SMs, whose rings go on from one tile to the next,
# at 1, 2 and 4 steps a tile.
SHAPES = [
    (1, 8, 3),
    (77, 64, 16),
    (300, 576, 64),
    (128, 2048, 5),
    (1000, 768, 128),
    (513, 40, 257),
    (4096, 2048, 64),
    (129, 104, 4096),
    (40000, 64, 8),
    (40000, 72, 128),
    (20000, 200, 130),
]
ULP = 2.0**-24
"""Half a unit in fp32's last place, relative."""


@pytest.fixture
def hopper(gpu: str) -> str:
    if (arch := detect_arch(gpu)) != "sm_90a":
        pytest.skip(f"expected sm_90a, found {arch}")
    return gpu


def draw(n_tokens: int, width: int, n_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """bf16 tokens and an fp32 weight, on the CPU."""
    return torch.randn(n_tokens, width).bfloat16(), torch.randn(n_experts, width) * width**-0.5


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Of the norm."""
    return float((found.double().cpu() - expected).norm() / expected.norm())


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
def test_float32s_precision(hopper: str, shape: tuple[int, int, int]) -> None:
    """The error is that of fp32 sums; one wrong logit of a million would be seen. And again, the same bits."""
    x, weight = draw(*shape)
    there, parts = x.to(hopper), split(weight.to(hopper), 3)
    found = router_product(there, parts)
    assert (found.shape, found.dtype) == ((shape[0], shape[2]), torch.float32)
    assert error(found, x.double() @ weight.double().T) < 8 * ULP * shape[1] ** 0.5
    for _ in range(3):
        assert torch.equal(router_product(there, parts), found)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
def test_memory_around_the_logits_is_left_alone(hopper: str, shape: tuple[int, int, int]) -> None:
    x, weight = draw(*shape)
    there, parts = x.to(hopper), split(weight.to(hopper), 3)
    guard, n = 1 << 16, shape[0] * shape[2]
    memory = torch.full((n + 2 * guard,), 12345.0, device=hopper)
    logits = memory[guard : guard + n].view(shape[0], shape[2])
    logits.fill_(float("nan"))
    router_cuda._launch(there, parts, logits)
    assert torch.equal(logits, router_product(there, parts))
    assert (memory[:guard] == 12345.0).all()
    assert (memory[-guard:] == 12345.0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
def test_memory_around_the_operands_is_not_read(hopper: str, shape: tuple[int, int, int]) -> None:
    """NaN before and after them."""
    n_tokens, width, n_experts = shape
    x, weight = draw(*shape)
    there, parts = x.to(hopper), split(weight.to(hopper), 3)
    around_x = torch.full((n_tokens + 256, width), float("nan"), dtype=torch.bfloat16, device=hopper)
    around_parts = torch.full((n_experts + 256, 3, width), float("nan"), dtype=torch.bfloat16, device=hopper)
    around_x[128 : 128 + n_tokens], around_parts[128 : 128 + n_experts] = there, parts
    found = router_product(around_x[128 : 128 + n_tokens], around_parts[128 : 128 + n_experts])
    assert torch.equal(found, router_product(there, parts))


@pytest.mark.gpu
def test_a_tokens_logits_do_not_depend_on_its_neighbours(hopper: str) -> None:
    """Nor on its place in a tile; and NaN stays in its row."""
    x, weight = draw(1000, 768, 128)
    x, parts = x.to(hopper), split(weight.to(hopper), 3)
    whole = router_product(x, parts)
    assert torch.equal(router_product(x[77:], parts), whole[77:])
    assert torch.equal(router_product(x[500:501], parts), whole[500:501])
    x[333, 5] = float("nan")
    found = router_product(x, parts)
    assert found[333].isnan().all()
    others = torch.arange(1000, device=hopper) != 333
    assert torch.equal(found[others], whole[others])


@pytest.mark.gpu
def test_each_part_has_its_place(hopper: str) -> None:
    """Against one part after another, exact by small integers: a part that is lost or taken twice would show."""
    x = torch.randint(-4, 5, (300, 136)).bfloat16()
    parts = torch.randint(-4, 5, (70, 3, 136)).bfloat16()
    parts[:, 1] *= 16
    parts[:, 2] *= 256
    expected = torch.einsum("td,epd->te", x.double(), parts.double())
    assert torch.equal(router_product(x.to(hopper), parts.to(hopper)).double().cpu(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize(("n_tokens", "n_experts"), [(0, 4), (4, 0), (0, 0)])
def test_nothing(hopper: str, n_tokens: int, n_experts: int) -> None:
    x, parts = (torch.empty(n, dtype=torch.bfloat16, device=hopper) for n in ((n_tokens, 8), (n_experts, 3, 8)))
    assert router_product(x, parts).shape == (n_tokens, n_experts)


@pytest.mark.gpu
def test_tokens_between_multiples_of_16_bytes_are_refused(hopper: str) -> None:
    x = torch.zeros(6 * 8 + 4, dtype=torch.bfloat16, device=hopper)[4:].view(6, 8)
    with pytest.raises(ShapeError, match="multiple of 16 bytes"):
        router_product(x, torch.zeros(4, 3, 8, dtype=torch.bfloat16, device=hopper))


@pytest.mark.gpu
def test_the_router_takes_it(hopper: str) -> None:
    """Its logits have the product's bits, whether x's rows or its columns lie one after another."""
    x, weight = (tensor.to(hopper) for tensor in draw(300, 576, 64))
    expected = router_product(x, split(weight, 3))
    assert torch.equal(router_logits(x, weight), expected)
    assert torch.equal(router_logits(x.t().contiguous().t(), weight), expected)


@pytest.mark.gpu
def test_in_a_cuda_graph(hopper: str) -> None:
    """A replay sees the tokens and the weight of its time."""
    x, weight = (tensor.to(hopper) for tensor in draw(300, 576, 64))
    first = router_logits(x, weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = router_logits(x, weight)
    for old, new in zip((x, weight), draw(300, 576, 64), strict=True):
        old.copy_(new)
    graph.replay()
    assert torch.equal(captured, router_logits(x, weight))
    assert not torch.equal(captured, first)


@pytest.mark.gpu
def test_fake_shapes_are_the_real_ones(hopper: str) -> None:
    x, weight = (tensor.to(hopper) for tensor in draw(50, 64, 9))
    op = torch.ops.nmoe.router_product.default
    torch.library.opcheck(op, (x, split(weight, 3)), test_utils=("test_schema", "test_faketensor"))
