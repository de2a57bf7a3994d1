"""The CUDA `score_rows`: how rows are split, what is refused and what goes to Triton; on a GPU, against float64."""

from typing import Any

import pytest
import torch
from nmoe.kernels.errors import ShapeError
from nmoe.kernels.runtime.cuda_source import CudaSource
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("cuda.bindings", reason="the CUDA kernels are for Linux")
pytest.importorskip("triton", reason="Triton is for Linux")
from nmoe.kernels.native import cross_entropy_cuda as module
from nmoe.kernels.native import cross_entropy_triton
from nmoe.kernels.native.cross_entropy_cuda import SOURCES, score_rows

IGNORE = -100
NAN, INF = float("nan"), float("inf")
ROUNDING = 2.0**-8
"""Of bf16 to nearest, relative."""
MOST = 54_016
"""Logits that a block holds."""


# --- without a GPU ---------------------------------------------------------------------------------------------------


def test_every_row_of_fours_is_held_by_the_fewest_blocks() -> None:
    """None of them without a share, which the kernel does not look out for."""
    for vocab in range(4, 8 * MOST + 1, 4):
        cluster = module._cluster_for(vocab)
        assert cluster is not None
        slice_quads = module._slice_quads(vocab // 4, cluster)
        assert slice_quads * 4 <= MOST
        assert (cluster - 1) * slice_quads < vocab // 4 <= cluster * slice_quads
        assert cluster == 1 or vocab > cluster // 2 * MOST


@pytest.mark.parametrize("vocab", [0, 1, 2, 4095, 50_257, 8 * MOST + 4])
def test_other_rows_are_not(vocab: int) -> None:
    assert module._cluster_for(vocab) is None


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_the_largest_slice_and_the_threads_have_room(source: CudaSource, arch: str, ahead: Any) -> None:
    """228 KiB of a multiprocessor, with the 1 KiB that a block costs by itself; two blocks where slices are small."""
    defines = dict(source.defines)
    found = ahead.cuda.get(source, arch).resources
    assert not found.spills
    assert found.shared_bytes + defines["MOST_QUADS"] * 16 <= 228 << 10
    assert found.registers * 1024 <= 1 << 16
    assert defines["MOST_QUADS"] * 4 == MOST


def arguments(**changes: Any) -> dict[str, Any]:
    given = {
        "logits_CV": torch.empty(3, 8, device="cuda"),
        "target_C": torch.empty(3, dtype=torch.int64, device="cuda"),
        "nll_C": torch.empty(3, device="cuda"),
        "dlogits_CV": torch.empty(3, 8, dtype=torch.bfloat16, device="cuda"),
    }
    return given | changes


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (lambda: {"logits_CV": torch.empty(3, 8, device="cuda").double()}, "logits.*float32.*found.*float64"),
        (lambda: {"logits_CV": torch.empty(8, 3, device="cuda").mT}, r"logits.*contiguous.*strides \(1, 3\)"),
        (lambda: {"target_C": torch.empty(3, dtype=torch.int32, device="cuda")}, "target.*int64.*found.*int32"),
        (lambda: {"target_C": torch.empty(3, dtype=torch.int64)}, "target.*on cuda.*found.*on cpu"),
        (lambda: {"nll_C": torch.empty(4, device="cuda")}, r"nll \(3,\).*found \(4,\)"),
        (lambda: {"dlogits_CV": torch.empty(3, 8, device="cuda")}, "dlogits.*bfloat16.*found.*float32"),
    ],
)
def test_refusals(changes: Any, told: str) -> None:
    with FakeTensorMode(), pytest.raises(ShapeError, match=told):
        score_rows(**arguments(**changes()))


# --- on a GPU --------------------------------------------------------------------------------------------------------

VOCABS = (8, 32, 1000, 4096, 50_304, 54_000, 54_008, 108_000, 201_088, 262_144)
EDGES = (4, 124, 128, 132, 508, 512, 516, 8188, 8192, *(n * MOST + d for n in (1, 2, 4) for d in (0, 4)), 8 * MOST)
"""Of warps' and pieces' shares, and of what 1, 2, 4 and 8 blocks hold."""


def draw(rows: int, vocab: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of six kinds in turn: plain; far apart; mostly -inf; certain; ignored, whose logits are not read; and with a
    target that cannot be."""
    logits = torch.randn(rows, vocab, device="cuda") * 3
    target = torch.randint(vocab, (rows,), device="cuda")
    row = torch.arange(rows, device="cuda")
    far = logits[1::6]
    far += torch.where(torch.rand_like(far) < 0.5, 1e4, -1e4)
    masked = logits[2::6]
    masked.masked_fill_(torch.rand_like(masked) < 0.9, -INF)
    logits[row[2::6], target[2::6]] = 1.0
    logits[row[3::6], target[3::6]] = 40.0
    target[4::6], logits[4::6] = IGNORE, NAN
    logits[row[5::6], target[5::6]] = -INF
    return logits, target


def score(
    logits: torch.Tensor, target: torch.Tensor, with_grad: bool = True
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """In buffers of NaN: what is not written shows; and with a guard after their ends."""
    nll = torch.full((len(target) + 1,), NAN, device="cuda")
    dlogits = torch.full((logits.numel() + 16,), NAN, device="cuda", dtype=torch.bfloat16)
    inside = dlogits[: logits.numel()].view_as(logits)
    score_rows(logits, target, nll[:-1], inside if with_grad else None)
    assert nll[-1].isnan()
    assert dlogits[logits.numel() :].isnan().all()
    return nll[:-1], inside if with_grad else None


def check(logits: torch.Tensor, target: torch.Tensor, nll: torch.Tensor, dlogits: torch.Tensor) -> None:
    """The loss within roundings of fp32, with an exponential of 2^-22. A gradient is rounded once to bf16; fp32's own
    errors are an eighth of that, and where 1 was subtracted, of 1."""
    for at in range(0, len(target), 64):
        part = slice(at, at + 64)
        valid = target[part] != IGNORE
        x = torch.where(valid[:, None], logits[part].double(), 0.0)
        aim = target[part].clamp_min(0)[:, None]
        lse = x.logsumexp(1, keepdim=True)
        exact = torch.where(valid, (lse - x.gather(1, aim))[:, 0], 0.0)
        error = (nll[part] - exact).abs()
        infinite = exact.isinf()
        assert torch.equal(nll[part][infinite].double(), exact[infinite])
        assert (error <= 64 * 2.0**-24 * (1 + exact.abs()))[~infinite].all()
        x.sub_(lse).exp_()
        x.scatter_add_(1, aim, torch.full_like(x[:, :1], -1.0)).mul_(valid[:, None])
        bound = 1.125 * ROUNDING * x.abs() + torch.where(x < 0, 2.0**-20, 1e-30)
        assert ((dlogits[part] - x).abs() <= bound).all()


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.fixture
def only_cuda(gpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing goes to Triton unseen."""

    def refuse(*arguments: Any) -> None:
        raise AssertionError("rows that fit went to Triton")

    monkeypatch.setattr(cross_entropy_triton, "score_rows", refuse)


@pytest.mark.gpu
@pytest.mark.usefixtures("only_cuda")
class TestOnGpu:
    @pytest.mark.parametrize("rows", [1, 3, 200, 1000])
    @pytest.mark.parametrize("vocab", VOCABS)
    def test_equals_float64(self, vocab: int, rows: int) -> None:
        """Fewer rows than clusters, and some for each; the same bits again, and of a loss without a gradient."""
        logits, target = draw(rows, vocab)
        before = logits.clone()
        nll, dlogits = score(logits, target)
        assert dlogits is not None
        check(logits, target, nll, dlogits)
        assert same_bits(logits, before)
        again, same = score(logits, target)
        assert same is not None
        assert same_bits(nll, again)
        assert same_bits(dlogits, same)
        assert same_bits(nll, score(logits, target, with_grad=False)[0])

    @pytest.mark.parametrize("vocab", EDGES)
    def test_at_the_edges_of_shares(self, vocab: int) -> None:
        logits, target = draw(300, vocab)
        target[0], target[6] = 0, vocab - 1
        nll, dlogits = score(logits, target)
        assert dlogits is not None
        check(logits, target, nll, dlogits)

    @pytest.mark.parametrize("vocab", [4096, 50_304, 108_000, 201_088, 262_144])
    def test_every_place_of_a_row_counts(self, vocab: int) -> None:
        """A logit that stands out is found wherever it is, and its gradient stands there: one in each piece."""
        place = torch.arange(0, vocab, 509, device="cuda")
        logits = torch.randn(len(place), vocab, device="cuda")
        logits[torch.arange(len(place)), place] = 30.0
        nll, dlogits = score(logits, place)
        assert dlogits is not None
        check(logits, place, nll, dlogits)

    @pytest.mark.parametrize("rows", [5, 700])
    @pytest.mark.parametrize("vocab", [4096, 201_088])
    def test_few_rows_are_scored(self, vocab: int, rows: int) -> None:
        """The next scored row is found across any number of others, and where there is none."""
        for scored in ([], [0], [rows - 1], [1, rows - 2], list(range(rows // 2, rows // 2 + 2))):
            logits = torch.full((rows, vocab), NAN, device="cuda")
            target = torch.full((rows,), IGNORE, device="cuda")
            for row in scored:
                logits[row].normal_()
                target[row] = row % vocab
            nll, dlogits = score(logits, target)
            assert dlogits is not None
            check(logits, target, nll, dlogits)

    @pytest.mark.parametrize("vocab", [1000, 50_304, 108_000, 201_088, 262_144])
    @pytest.mark.parametrize("spoil", ["nan", "inf", "late nan", "late inf", "all -inf", "no such id", "negative id"])
    def test_hides_nothing(self, vocab: int, spoil: str) -> None:
        """The row's loss is NaN, and its gradient where a logit is to blame; its neighbours are right."""
        logits = torch.randn(7, vocab, device="cuda")
        target = torch.randint(vocab, (7,), device="cuda")
        if spoil == "all -inf":
            logits[2] = -INF
        elif spoil.endswith("id"):
            target[2] = vocab if spoil == "no such id" else -1
        else:
            logits[2, vocab - 1 if spoil.startswith("late") else 17] = NAN if spoil.endswith("nan") else INF
        nll, dlogits = score(logits, target)
        assert dlogits is not None
        assert nll[2].isnan()
        assert score(logits, target, with_grad=False)[0][2].isnan()
        if spoil.endswith("id"):
            assert abs(float(dlogits[2].double().sum()) - 1) < 2 * ROUNDING, "softmax, and no one-hot"
        else:
            assert dlogits[2].isnan().all()
        others = torch.arange(7, device="cuda") != 2
        check(logits[others], target[others], nll[others], dlogits[others])

    def test_a_row_does_not_depend_on_its_place(self) -> None:
        """Nor on how many rows there are: the bits are the row's own."""
        for vocab in (1000, 50_304, 201_088):
            logits, target = draw(500, vocab)
            nll, dlogits = score(logits, target)
            one, alone = score(logits[333:334], target[333:334])
            assert dlogits is not None
            assert alone is not None
            assert same_bits(nll[333:334], one)
            assert same_bits(dlogits[333:334], alone)

    def test_places_beyond_2_to_31(self) -> None:
        """Only the last row is filled, scored and looked at."""
        vocab, rows = 1 << 18, (1 << 13) + 2
        if torch.cuda.mem_get_info()[0] < 16 << 30:
            pytest.skip("needs 16 GiB of free device memory")
        logits = torch.empty(rows, vocab, device="cuda")
        dlogits = torch.empty(rows, vocab, device="cuda", dtype=torch.bfloat16)
        logits[-1].normal_()
        target = torch.full((rows,), IGNORE, device="cuda")
        target[-1] = vocab - 1
        nll = torch.empty(rows, device="cuda")
        score_rows(logits, target, nll, dlogits)
        check(logits[-1:], target[-1:], nll[-1:], dlogits[-1:])
        assert not dlogits[-2].any()
        assert not nll[:-1].any()

    @pytest.mark.parametrize("vocab", [1000, 50_304, 201_088])
    def test_in_a_cuda_graph(self, vocab: int) -> None:
        """A replay sees the inputs of its time, and other rows ignored."""
        logits, target = draw(200, vocab)
        score(logits, target)
        nll = torch.empty(200, device="cuda")
        dlogits = torch.empty_like(logits, dtype=torch.bfloat16)
        alone = torch.empty_like(nll)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            score_rows(logits, target, nll, dlogits)
            score_rows(logits, target, alone, None)
        for turn in range(3):
            later = draw(200, vocab)
            logits.copy_(later[0].roll(turn, 0))
            target.copy_(later[1].roll(turn, 0))
            graph.replay()
            check(logits, target, nll, dlogits)
            assert same_bits(nll, alone)

    def test_no_rows(self) -> None:
        score_rows(
            torch.empty(0, 16, device="cuda"),
            torch.empty(0, dtype=torch.int64, device="cuda"),
            torch.empty(0, device="cuda"),
            None,
        )


@pytest.mark.gpu
@pytest.mark.parametrize("why", ["odd", "too long", "logits off 16 bytes", "dlogits off 16 bytes"])
def test_all_else_goes_to_triton(gpu: str, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    vocab = {"odd": 1001, "too long": 8 * MOST + 4}.get(why, 1000)
    off = {name: int(why.startswith(name)) for name in ("logits", "dlogits")}
    logits = torch.randn(7 * vocab + 1, device=gpu)[off["logits"] :][: 7 * vocab].view(7, vocab)
    dlogits = torch.empty(7 * vocab + 1, device=gpu, dtype=torch.bfloat16)[off["dlogits"] :][: 7 * vocab]
    target, nll = torch.randint(vocab, (7,), device=gpu), torch.empty(7, device=gpu)
    calls, triton = [], cross_entropy_triton.score_rows

    def note(*given: Any) -> None:
        calls.append(given)
        triton(*given)

    monkeypatch.setattr(cross_entropy_triton, "score_rows", note)
    score_rows(logits, target, nll, dlogits.view(7, vocab))
    assert calls
    check(logits, target, nll, dlogits.view(7, vocab))
