"""The Triton AdamW without a GPU: in Triton's interpreter against float64, and compiled for Hopper and Blackwell."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from nmoe.kernels.reference.adamw import AdamWStep, adamw_
from nmoe.kernels.reference.master import join_master, split_master

pytest.importorskip("triton", reason="Triton is for Linux")

GUARD = 16
ROUNDING = 2.0**-24
"""Of one fp32 operation, relative."""

SIZES = (1, 4095, 4096, 4097, 9001)
"""Around one block of 4096, and a last block that is mostly mask."""

STEPS = {
    "first": AdamWStep(lr=3e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, step=1),
    "later": AdamWStep(lr=3e-4, beta1=0.9, beta2=0.999, eps=1e-10, weight_decay=0.0, step=1000),
}
CASES = [f"{kind}-{n}-{when}" for kind in ("split", "plain") for n in SIZES for when in STEPS]


def draw(case: str) -> dict[str, np.ndarray]:
    kind, n, when = case.split("-")
    rng = np.random.default_rng(CASES.index(case))
    room = int(n) + GUARD
    size = 10.0 ** rng.integers(-9, 3, room)  # gradients from where eps rules to where nothing does
    fresh = when == "first"
    arrays = {
        "weight": rng.standard_normal(room) * 10.0 ** rng.integers(-6, 2, room),
        "grad": rng.standard_normal(room) * size,
        "exp_avg": rng.standard_normal(room) * size * (not fresh),
        "exp_avg_sq": rng.random(room) * size**2 * (not fresh),
        "grad_scale": np.array(0.37),
    }
    arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
    if kind == "split":
        upper, rest = split_master(torch.from_numpy(arrays["weight"]))
        arrays["weight"], arrays["residual"] = upper.view(torch.int16).numpy(), rest.numpy()
    s = STEPS[when]
    scalars = np.array([s.lr, s.beta1, s.beta2, s.eps, s.weight_decay, s.step])
    return arrays | {"scalars": scalars, "n": np.array(int(n))}


@pytest.fixture(scope="module")
def interpreted(interpret: Callable[..., dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """State after one update, by `<case>/<name>`, from one run of the interpreter."""
    return interpret("adamw_interpreted.py", {case: draw(case) for case in CASES})


def master_of(arrays: dict[str, np.ndarray]) -> np.ndarray:
    weight = torch.from_numpy(arrays["weight"])
    if "residual" in arrays:
        weight = join_master(weight.view(torch.bfloat16), torch.from_numpy(arrays["residual"]))
    return weight.numpy()


def exact(case: dict[str, np.ndarray], s: AdamWStep) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """(value, bound on the error) of master, m and v in float64.

    Each bound counts fp32 roundings: of each scalar when it is cast, and of each operation. Moments have at most four
    on each term; the update about eight (two casts, m, v's root at half weight, two divisions, eps, product); the
    weight two more. Where m nearly cancels, what was rounded are its two terms, so that the bound is on their sizes.
    """
    g = case["grad"].astype(np.float64) * np.float64(case["grad_scale"])
    m0, v0, w0 = (x.astype(np.float64) for x in (case["exp_avg"], case["exp_avg_sq"], master_of(case)))
    m, v = m0 * s.beta1 + g * (1 - s.beta1), v0 * s.beta2 + g * g * (1 - s.beta2)
    denominator = np.sqrt(v) / np.sqrt(1 - s.beta2**s.step) + s.eps
    rate = s.lr / (1 - s.beta1**s.step)
    w = w0 * (1 - s.lr * s.weight_decay) - rate * m / denominator
    m_terms = np.abs(m0) + np.abs(g)
    tiny = 2.0**-149
    return (
        (w, ROUNDING * (3 * np.abs(w0) + np.abs(w) + 10 * rate * m_terms / denominator)),
        (m, ROUNDING * 4 * m_terms + tiny),
        (v, ROUNDING * 5 * v + tiny),
    )


def after(case: str, interpreted: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {key.split("/")[1]: array for key, array in interpreted.items() if key.split("/")[0] == case}


@pytest.mark.parametrize("case", CASES)
def test_interpreted_kernel_equals_float64(interpreted: dict[str, np.ndarray], case: str) -> None:
    before, found = draw(case), after(case, interpreted)
    n, step = int(before["n"]), STEPS[case.split("-")[2]]
    values = (master_of(found), found["exp_avg"], found["exp_avg_sq"])
    for name, value, (expected, bound) in zip(("master", "m", "v"), values, exact(before, step), strict=True):
        assert (np.abs(value - expected)[:n] <= bound[:n]).all(), name


@pytest.mark.parametrize("case", CASES)
def test_nothing_beyond_the_parameter_is_written(interpreted: dict[str, np.ndarray], case: str) -> None:
    before, found = draw(case), after(case, interpreted)
    for name, array in found.items():
        assert np.array_equal(array[-GUARD:], before[name][-GUARD:]), name


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("split")])
def test_interpreted_kernel_splits_like_the_reference(interpreted: dict[str, np.ndarray], case: str) -> None:
    """The pair is the one that `split_master` makes of the master. Its bf16 half is the reference's, but where a few
    fp32 roundings carry a master over one of the borders between two bf16 (2^16 apart): one in thousands."""
    before, found = draw(case), after(case, interpreted)
    n = int(before["n"])
    upper, rest = split_master(torch.from_numpy(master_of(found))[:n])
    assert np.array_equal(upper.view(torch.int16).numpy(), found["weight"][:n])
    assert np.array_equal(rest.numpy(), found["residual"][:n])

    tensors = [torch.from_numpy(before[name].copy())[:n] for name in ("grad", "exp_avg", "exp_avg_sq")]
    weight, residual = torch.from_numpy(before["weight"].copy())[:n], torch.from_numpy(before["residual"].copy())[:n]
    scale = torch.from_numpy(before["grad_scale"])
    adamw_(weight.view(torch.bfloat16), residual, *tensors, scale, STEPS[case.split("-")[2]])
    assert (weight.numpy() != found["weight"][:n]).sum() <= 1 + n // 1000


@pytest.mark.parametrize("mistake", ["residual dropped", "gradient not scaled", "eps doubled", "decay left out"])
def test_the_bounds_tell_mistakes_apart(interpreted: dict[str, np.ndarray], mistake: str) -> None:
    case = "split-4096-first"
    before, found, step = draw(case), after(case, interpreted), STEPS["first"]
    if mistake == "residual dropped":
        before["residual"] = np.zeros_like(before["residual"])
    elif mistake == "gradient not scaled":
        before["grad_scale"] = np.array(1.0)
    elif mistake == "eps doubled":
        step = AdamWStep(step.lr, step.beta1, step.beta2, 2 * step.eps, step.weight_decay, step.step)
    else:
        step = AdamWStep(step.lr, step.beta1, step.beta2, step.eps, 0.0, step.step)
    expected, bound = exact(before, step)[0]
    assert (np.abs(master_of(found) - expected)[:4096] > bound[:4096]).mean() > 0.05


POINTERS = {torch.float32: "*fp32", torch.int16: "*i16"}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("split", [True, False], ids=["split", "plain"])
@pytest.mark.parametrize("capability", [90, 100])
def test_compiles_without_spills(
    capability: int, split: bool, launches_of, monkeypatch, tmp_path: Path, capsys
) -> None:
    """As it is launched, for sm_90a and sm_100a, with loads of 16 bytes where the sizes allow them, and no fused
    multiply-add (whose default differs between versions of Triton)."""
    import triton
    from nmoe.kernels.native import adamw_triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, launches = adamw_triton._adamw_kernel, launches_of(adamw_triton, "_adamw_kernel")
    weight, residual = split_master(torch.zeros(1 << 16)) if split else (torch.zeros(1 << 16), None)
    m, v, grad = torch.zeros(3, 1 << 16)
    adamw_triton.adamw_(weight, residual, grad, m, v, torch.ones(()), STEPS["first"])
    assert launches.grid == (16,)

    constants = {name: value for name, value in launches.options.items() if name in kernel.arg_names}
    options = {name: value for name, value in launches.options.items() if name not in constants}
    signature, aligned = dict.fromkeys(constants, "constexpr"), {}
    for place, (name, arg) in enumerate(zip(kernel.arg_names, launches.args, strict=False)):
        if isinstance(arg, torch.Tensor):
            signature[name] = POINTERS[arg.dtype]
        else:
            signature[name] = "i32" if isinstance(arg, int) else "fp32"
        if signature[name] == "i32" or (signature[name].startswith("*") and name != "grad_scale_ptr"):
            aligned[(place,)] = [["tt.divisibility", 16]]
    signature = {name: signature[name] for name in kernel.arg_names}
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DUMP_PTXAS_LOG", "1")
    source = ASTSource(kernel, signature, constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)

    ptx = compiled.asm["ptx"]
    assert f".target sm_{capability}a" in ptx
    assert "ld.global.v4.b32" in ptx
    assert "fma.rn" not in ptx
    assert "sqrt.rn.f32" in ptx
    assert "0 bytes spill stores, 0 bytes spill loads" in capsys.readouterr().out
