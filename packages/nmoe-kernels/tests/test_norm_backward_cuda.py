"""The CUDA backward of RMSNorm: what it takes, room for it, and how it is launched; on a GPU, that it stays within."""

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("cuda.bindings", reason="the CUDA kernels are for Linux")
pytest.importorskip("triton", reason="Triton is for Linux")
from nmoe.kernels.native import norm_backward_cuda as module
from nmoe.kernels.native.norm import MAX_WIDTH


@pytest.mark.parametrize("add", [False, True])
def test_every_width_has_a_kernel_with_room_for_its_rows(add: bool) -> None:
    """Of 227 KiB, 3 KiB are left to barriers and sums; and in the end, a block's sums fit where its rows were."""
    for width in range(256, MAX_WIDTH + 1, 8):
        plan, _ = module._kernel_for(width, add)
        assert width <= plan.max_width
        assert plan.add == add
        shared = plan.shared_bytes(width)
        assert plan.teams * plan.stages * width * 2 * (2 + add) <= shared <= 224 << 10
        assert shared >= plan.teams * width * 4
        assert plan.team_warps == 1 or plan.teams <= 15, "named barriers"


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
def test_no_register_is_spilled_and_a_block_fits(arch: str, ahead: Any) -> None:
    for plan, kernel in (entry for kernels in module._KERNELS.values() for entry in kernels):
        found = ahead.cuda.get(kernel.source, arch).resources
        assert not found.spills, kernel.source.name
        assert found.registers * plan.threads <= 1 << 16
        assert found.shared_bytes + plan.shared_bytes(plan.max_width) <= 227 << 10


def test_the_same_number_of_blocks_on_every_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the bits of the gain's gradient depend on it: nothing of the device is asked."""
    launched = []

    class Kernel:
        def launch(self, grid: tuple[int, ...], block: int, shared_bytes: int, params: Any) -> None:
            launched.append((grid[0], params.n_rows, params.pieces, params.x_row))

    plan, _ = module._kernel_for(768, False)
    sums = []
    monkeypatch.setattr(module, "_kernel_for", lambda *_: (plan, Kernel()))

    def note_sum(gains: Any, partial_PGD: torch.Tensor, wanted: Any) -> list[None]:
        sums.append(partial_PGD.shape)
        return [None]

    monkeypatch.setattr(module, "deliver_sums", note_sum)
    weight = torch.zeros(768).bfloat16()
    for rows in (0, 1, plan.teams, plan.teams + 1, 5000):
        x = torch.zeros(rows, 800).bfloat16()[:, :768]
        dout = torch.zeros(rows, 768).bfloat16()
        module.backward(dout, None, x, torch.zeros(rows), weight, dout, True)
        blocks = min(module._BLOCKS, -(-rows // plan.teams))
        assert sums.pop() == (blocks, 1, 768)
        assert rows == 0 or launched.pop() == (blocks, rows, 96, 1600)
    assert not launched


def test_takes_what_bulk_copies_can_fetch(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no rows that would leave warps idle."""
    with FakeTensorMode():

        def rows(width: int, row: int = 0, start: int = 0, device: str = "cuda") -> torch.Tensor:
            whole = torch.empty(5, max(row, width + start), device=device, dtype=torch.bfloat16)
            return whole[:, start : start + width]

        monkeypatch.setattr(type(rows(8)), "data_ptr", lambda self: 2 * self.storage_offset())
        x, weight = rows(768), rows(768)[0]
        assert module.takes(x, None, x, weight)
        assert module.takes(x, x, rows(768, 784, 8), weight)
        assert module.takes(x, x, x[:0], weight)
        refused = {
            "width": (*(rows(772),) * 3, rows(772)[0]),
            "short": (*(rows(248),) * 3, rows(248)[0]),
            "x's start": (x, x, rows(768, 784, 4), weight),
            "x's rows": (x, x, rows(768, 772), weight),
            "dout's start": (rows(768, start=4), x, x, weight),
            "dtotal's start": (x, rows(768, start=4), x, weight),
            "gain's start": (x, x, x, rows(768, start=4)[0]),
            "device": (*(rows(768, device="cpu"),) * 3, rows(768, device="cpu")[0]),
        }
        for why, given in refused.items():
            assert not module.takes(*given), why


@pytest.mark.gpu
@pytest.mark.parametrize("width", [512, 768, 1032, 2048])
def test_nothing_beside_is_read_or_written(gpu: str, width: int) -> None:
    """x's rows lie in longer ones, what is beside them NaN; dx has a guard behind it."""
    x, dout, dtotal = torch.randn(3, 1003, width, device=gpu).bfloat16()
    scale, weight = torch.rand(1003, device=gpu), torch.randn(width, device=gpu).bfloat16()
    expected = torch.empty_like(x)
    dweight = module.backward(dout, dtotal, x, scale, weight, expected, True)
    around = torch.full((1003, width + 64), float("nan"), device=gpu, dtype=torch.bfloat16)
    inside = around[:, 32 : 32 + width].copy_(x)
    room = torch.full((1003 * width + 64,), 7.0, device=gpu, dtype=torch.bfloat16)
    dx = room[: 1003 * width].view(1003, width)
    again = module.backward(dout, dtotal, inside, scale, weight, dx, True)
    assert bool(expected.isfinite().all())
    assert torch.equal(dx, expected)
    assert torch.equal(again, dweight)
    assert bool((room[1003 * width :] == 7.0).all())
