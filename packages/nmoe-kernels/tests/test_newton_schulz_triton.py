"""The Triton Newton-Schulz: in the interpreter without a GPU, and on one (`-m gpu`).

The symmetric products are of small integers, which bf16 holds as the sums too: they equal float64's exactly, whatever
the order of a sum. The whole iteration is compared with its polynomial of the singular values.
"""

from typing import Any

import numpy as np
import pytest
import torch
from nmoe.kernels.errors import ShapeError
from nmoe.kernels.reference.newton_schulz import newton_schulz as reference

pytest.importorskip("triton", reason="Triton is for Linux")

GUARD = float(torch.tensor(12345.0).bfloat16())
FACTORS = (0.25, -2.0, 3.0)
"""Of the product, of the matrix itself, and of the identity."""
NORM = 1024.0
"""Of the first matrix, and twice that of each next one: 1e-7 more is the same number in fp32."""
PARTS = 32

PRODUCTS = {
    "one": (1, 1, 1),
    "thin": (2, 1, 40),
    "tile": (2, 16, 32),
    "tails": (3, 21, 45),
    "four_tiles": (2, 50, 70),
    "many_tiles": (1, 150, 33),
    "whole": (3, 64, 96),
}
"""Q, M, N; tiles of the interpreter are 16 × 16, summed in steps of 32."""
PRODUCT_CASES = [f"{name}-{kind}" for name in PRODUCTS for kind in ("wide", "tall")]
NORMED_CASES = ["tails-wide-normed", "tails-tall-normed", "whole-wide-normed"]
SHAPES = {"wide": (3, 20, 37), "tall": (2, 37, 20), "square": (2, 33, 33), "one": (1, 1, 5), "whole": (2, 32, 64)}
LONG = (2, 300, 250)
"""Of which a part has more than one block."""


def draw(case: str) -> dict[str, np.ndarray]:
    if case in SHAPES:
        rng = np.random.default_rng(SHAPES[case])
        matrices = torch.from_numpy(rng.standard_normal(SHAPES[case])).bfloat16().float().numpy()
        return {"matrices": matrices, "steps": np.array(5)}
    if case == "long":
        return {"matrices": np.random.default_rng(0).integers(-3, 4, LONG).astype(np.float32), "steps": np.array(0)}
    if case == "scaled":
        return draw("wide") | {"matrices": draw("wide")["matrices"] * 64}
    name, kind, *normed = case.split("-")
    count, m, n = PRODUCTS[name]
    rng = np.random.default_rng(PRODUCTS[name])
    # Few enough that a Gram matrix stays below 2^8 and its polynomial's terms are whole in bf16.
    x = (rng.integers(-1, 2, (count, m, n)) * (rng.random((count, m, n)) < 4 / (m + n))).astype(np.float32)
    x = np.ascontiguousarray(x.swapaxes(1, 2)) if kind == "tall" else x
    squares = np.repeat((NORM * 2.0 ** np.arange(count)[:, None]) ** 2 / PARTS, PARTS, 1).astype(np.float32)
    case_of = {"x": x, "tall": np.array(kind == "tall"), "factors": np.array(FACTORS), "squares": squares}
    return case_of | {"powers": np.array([2, 1] if normed else [0, 0])}


def exact_products(case: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    x = case["x"].astype(np.float64)
    x = x.swapaxes(1, 2) if case["tall"] else x
    gram = x @ x.swapaxes(1, 2)
    norm = np.sqrt(case["squares"].astype(np.float64).sum(1))[:, None, None]
    of_gram, of_polynomial = case["powers"].tolist()
    gram = gram / norm**of_gram
    product, own, identity = FACTORS
    polynomial = product * gram @ gram + own * gram + identity * np.eye(gram.shape[1])
    return {"gram": gram, "polynomial": polynomial / norm**of_polynomial}


def error(found: torch.Tensor, matrices: torch.Tensor) -> float:
    """Relative, of the norm, of the worst matrix, against float64."""
    exact = reference(matrices.double(), steps=5)
    return float(((found.double() - exact).norm(dim=(1, 2)) / exact.norm(dim=(1, 2))).max())


@pytest.fixture(scope="module")
def interpreted(interpret: Any) -> dict[str, np.ndarray]:
    cases = (*PRODUCT_CASES, *NORMED_CASES, *SHAPES, "scaled", "long")
    return interpret("newton_schulz_interpreted.py", {case: draw(case) for case in cases})


@pytest.mark.parametrize("case", PRODUCT_CASES)
def test_interpreted_products_equal_float64(interpreted: dict[str, np.ndarray], case: str) -> None:
    """On both sides of the diagonal, and nothing beyond is written."""
    for name, expected in exact_products(draw(case)).items():
        assert np.array_equal(torch.from_numpy(expected).bfloat16().double().numpy(), expected), "bf16 must hold it"
        found = interpreted[f"{case}/{name}"]
        assert np.array_equal(found[:-1], expected), name
        assert (found[-1] == GUARD).all()


@pytest.mark.parametrize("case", NORMED_CASES)
def test_interpreted_products_over_norms_are_near_float64(interpreted: dict[str, np.ndarray], case: str) -> None:
    """Each matrix over its own norm's power; the polynomial's terms differ too much for bf16 to hold their sum."""
    exact = exact_products(draw(case))
    assert np.array_equal(interpreted[f"{case}/gram"][:-1], exact["gram"])
    found, expected = interpreted[f"{case}/polynomial"], exact["polynomial"]
    assert (np.abs(found[:-1] - expected) <= 2.0**-7 * np.abs(expected)).all()
    assert (found[-1] == GUARD).all()


@pytest.mark.parametrize("case", [*SHAPES, "long"])
def test_interpreted_squares_make_the_norm(interpreted: dict[str, np.ndarray], case: str) -> None:
    matrices = draw(case)["matrices"].astype(np.float64)
    found = interpreted[f"{case}/squares"].astype(np.float64)
    assert found.shape == (len(matrices), PARTS)
    np.testing.assert_allclose(found.sum(1), (matrices**2).sum((1, 2)), rtol=2.0**-20)
    assert case != "long" or (np.count_nonzero(found, 1) == -(-300 * 250 // 4096)).all(), "parts of two blocks"


def test_a_power_of_two_changes_no_bit(interpreted: dict[str, np.ndarray]) -> None:
    """It is divided out, though nothing divides the matrices."""
    assert np.array_equal(interpreted["scaled/out"], interpreted["wide/out"])


@pytest.mark.parametrize("mistake", ["not transposed", "lower half only", "a column left out"])
def test_the_products_oracle_tells_mistakes_apart(interpreted: dict[str, np.ndarray], mistake: str) -> None:
    case = draw("four_tiles-wide")
    expected = exact_products(case)["gram"]
    if mistake == "not transposed":
        case = draw("four_tiles-wide") | {"x": np.flip(case["x"], 1)}
        expected = exact_products(case)["gram"]
    elif mistake == "lower half only":
        expected = np.tril(expected)
    else:
        case["x"] = case["x"].copy()
        case["x"][:, :, 64] = 0
        expected = exact_products(case)["gram"]
    assert not np.array_equal(interpreted["four_tiles-wide/gram"][:-1], expected)


@pytest.mark.parametrize("case", SHAPES)
def test_interpreted_iteration_follows_float64(interpreted: dict[str, np.ndarray], case: str) -> None:
    """15 products of unit-sized matrices, each cut off at 2^-7 by the interpreter; a lost step errs by more."""
    matrices = torch.from_numpy(draw(case)["matrices"])
    found = torch.from_numpy(interpreted[f"{case}/out"])
    assert found.shape == matrices.shape
    assert error(found, matrices) < 0.2
    assert error(reference(matrices.double(), steps=4), matrices) > 0.2


@pytest.mark.parametrize(
    "matrices",
    [
        torch.zeros(2, 3, 4),
        torch.zeros(4).bfloat16(),
        torch.zeros(2, 4, 3).bfloat16().mT,
        torch.zeros(2, 3, 8).bfloat16()[:, :, ::2],
    ],
    ids=["fp32", "vector", "transposed", "strided"],
)
def test_refuses(matrices: torch.Tensor) -> None:
    from nmoe.kernels.native.newton_schulz_triton import newton_schulz

    with pytest.raises(ShapeError, match=r"expected matrices \(…, M, N\), contiguous torch.bfloat16"):
        newton_schulz(matrices, steps=5)


def test_refuses_a_matrix_beyond_32_bits() -> None:
    from nmoe.kernels.native.newton_schulz_triton import newton_schulz

    with pytest.raises(ShapeError, match="fewer than 2"):
        newton_schulz(torch.empty(1, 1 << 16, 1 << 15, dtype=torch.bfloat16, device="meta"), steps=5)


def signature_of(function: str, names: list[str], launched: Any) -> tuple[Any, ...]:
    def kind(arg: Any) -> str:
        if isinstance(arg, torch.Tensor):
            return {torch.bfloat16: "*bf16", torch.float32: "*fp32"}[arg.dtype]
        if isinstance(arg, (int, float)):
            return "i32" if isinstance(arg, int) else "fp32"
        return f"tensordesc<bf16{arg.block_shape}>"

    types = tuple((name, kind(arg)) for name, arg in zip(names, launched.args, strict=False))
    return function, types, frozenset(launched.options.items())


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
def test_what_is_compiled_ahead_is_what_is_launched(launches_of: Any, arch: str, monkeypatch: Any) -> None:
    """Whole tiles by tensor descriptors, others by pointers."""
    from nmoe.kernels.native import newton_schulz_triton as module

    monkeypatch.setattr(module, "_tile", lambda device: module._TILES[arch])
    names = {name: getattr(module, name).arg_names for name in ("_symmetric_kernel", "_symmetric_tma_kernel")}
    arguments, squares_kernel = module._squares_kernel.arg_names, launches_of(module, "_squares_kernel")
    module._squares(torch.zeros(2, 256, 512).bfloat16())
    assert squares_kernel.grid == (2 * PARTS,)
    launched = {signature_of("_squares_kernel", arguments, squares_kernel)}
    for shape, tiles in (((2, 256, 512), 3), ((2, 272, 528), 6), ((2, 512, 256), 3)):
        x, squares = torch.zeros(shape).bfloat16(), torch.zeros(2, PARTS)
        for own, powers in ((False, (0, 2)), (True, (0, 1))):
            given = torch.zeros(2, min(shape[1:]), min(shape[1:])).bfloat16() if own else x
            tall = shape[1] > shape[2] and not own
            for power in powers:
                kernels = {name: launches_of(module, name) for name in names}
                out, tile = torch.zeros_like(given), module._tile(x.device)
                module._symmetric(given, out, squares, (1.0, 2.0, 3.0), tile, tall=tall, own=own, power=power)
                name = "_symmetric_kernel" if tall or shape[1] == 272 else "_symmetric_tma_kernel"
                assert [key for key, kernel in kernels.items() if kernel.grid] == [name]
                assert kernels[name].grid == (2 * tiles,), "none above the diagonal"
                launched.add(signature_of(name, names[name], kernels[name]))
    listed = {
        (k.function, k.signature, frozenset((*k.constants, *k.options)))
        for k in module.TRITON_KERNELS
        if arch in k.arches
    }
    assert launched == listed


# --- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("tall", [False, True], ids=["wide", "tall"])
@pytest.mark.parametrize(("m", "n"), [(1, 1), (7, 300), (128, 64), (129, 130), (384, 768), (1000, 200)])
def test_products_equal_float64_on_a_gpu(gpu: str, m: int, n: int, tall: bool) -> None:
    from nmoe.kernels.native import newton_schulz_triton as module

    x = (torch.randint(-1, 2, (3, m, n)) * (torch.rand(3, m, n) < 4 / (m + n))).bfloat16()
    x_double = x.double()
    expected = x_double @ x_double.mT
    product, own, identity = FACTORS
    whole = product * expected @ expected + own * expected + identity * torch.eye(m).double()
    there = (x.mT.contiguous() if tall else x).to(gpu)
    gram, polynomial = (torch.full((3, m, m), torch.nan).bfloat16().to(gpu) for _ in range(2))
    tile, squares = module._tile(there.device), module._squares(there)
    module._symmetric(there, gram, squares, (1.0, 0.0, 0.0), tile, tall=tall, own=False, power=0)
    module._symmetric(gram, polynomial, squares, FACTORS, tile, tall=False, own=True, power=0)
    assert torch.equal(gram.cpu().double(), expected)
    assert torch.equal(polynomial.cpu().double(), whole)
    assert torch.equal(squares.sum(1).cpu().double(), x_double.square().sum((1, 2)))
    squares.fill_(NORM**2 / PARTS)
    module._symmetric(there, gram, squares, (1.0, 0.0, 0.0), tile, tall=tall, own=False, power=2)
    assert torch.equal(gram.cpu().double(), expected / NORM**2)
    module._symmetric(gram, polynomial, squares, (0.0, 0.0, 3.0), tile, tall=False, own=True, power=1)
    assert torch.equal(polynomial.cpu().double(), (3.0 / NORM) * torch.eye(m).double().expand(3, m, m))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape",
    [(3, 20, 37), (2, 640, 1000), (2, 1000, 640), (1, 384, 384), (3, 256, 448), (40, 64, 48), (2, 2, 5, 8)],
)
def test_follows_float64_on_a_gpu(gpu: str, shape: tuple[int, ...]) -> None:
    """A lost step errs by 0.3, the reference in bf16 by 0.02; and the same bits again, of a power of two times as much
    too."""
    from nmoe.kernels.native.newton_schulz_triton import newton_schulz

    matrices = torch.randn(shape).bfloat16()
    kept = matrices.to(gpu)
    first, second = (newton_schulz(kept, steps=5) for _ in range(2))
    assert torch.equal(kept.cpu(), matrices)
    assert (first.shape, first.dtype) == (matrices.shape, torch.bfloat16)
    assert torch.equal(first, second)
    assert torch.equal(newton_schulz(kept * 256, steps=5), first)
    flat = matrices.view(-1, *shape[-2:])
    assert error(first.cpu().view(flat.shape), flat) < 0.04


@pytest.mark.gpu
def test_no_matrices_and_zeros_on_a_gpu(gpu: str) -> None:
    from nmoe.kernels.native.newton_schulz_triton import newton_schulz

    assert newton_schulz(torch.zeros(0, 3, 4, device=gpu).bfloat16(), steps=5).shape == (0, 3, 4)
    assert not newton_schulz(torch.zeros(2, 130, 200, device=gpu).bfloat16(), steps=5).any()


@pytest.mark.gpu
def test_matrices_off_by_a_word_on_a_gpu(gpu: str) -> None:
    """Which tensor descriptors cannot read: near those of whole tiles, if not the same bits."""
    from nmoe.kernels.native.newton_schulz_triton import newton_schulz

    matrices = torch.randn(2 * 128 * 192 + 1, device=gpu).bfloat16()[1:].view(2, 128, 192)
    expected = newton_schulz(matrices.clone(), steps=5).float()
    assert float((newton_schulz(matrices, steps=5).float() - expected).norm() / expected.norm()) < 0.02


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(3, 200, 300), (3, 128, 192)])
def test_in_a_cuda_graph(gpu: str, shape: tuple[int, ...]) -> None:
    from nmoe.kernels.native.newton_schulz_triton import newton_schulz

    matrices = torch.randn(shape, device=gpu).bfloat16()
    newton_schulz(matrices, steps=5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = newton_schulz(matrices, steps=5)
    matrices.copy_(torch.randn(shape))
    graph.replay()
    assert torch.equal(out, newton_schulz(matrices, steps=5))
