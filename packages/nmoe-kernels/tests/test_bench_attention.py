"""The bench of attention in documents: what it packs and counts, and that its peer does the same work."""

from typing import Any

import pytest
import torch
from nmoe.kernels.bench import op_attention
from nmoe.kernels.bench.op_attention import attention, document_starts, visible_pairs, visible_pairs_in_documents
from nmoe.kernels.bench.op_case import Setting
from nmoe.kernels.ops import Ops
from torch.nn.attention.flex_attention import flex_attention


def seen(start_BS: torch.Tensor, window: int | None) -> torch.Tensor:
    """Boolean (B, S, S): the pairs that attention lets through."""
    position = torch.arange(start_BS.shape[1])
    distance = position[:, None] - position
    return (distance >= 0) & (distance < (window or len(position))) & (position >= start_BS[:, :, None])


def test_documents_are_as_long_as_asked() -> None:
    start_BS = document_starts(64, 4096, 100)
    assert start_BS.dtype == torch.int32
    assert (start_BS[:, 0] == 0).all()
    assert (start_BS.diff() >= 0).all()
    assert (start_BS <= torch.arange(4096)).all()
    begins = start_BS == torch.arange(4096)
    assert (start_BS.gather(1, start_BS.long()) == start_BS).all(), "a start is its own document's"
    assert 4096 * 64 / int(begins.sum()) == pytest.approx(100, rel=0.1)
    assert torch.equal(document_starts(64, 4096, 100), start_BS)


@pytest.mark.parametrize("window", [None, 1, 3, 40])
def test_pairs_are_those_of_the_mask(window: int | None) -> None:
    start_BS = document_starts(3, 40, 7)
    pairs = int(seen(start_BS, window).sum())
    assert visible_pairs_in_documents(start_BS, window) == pairs
    forward, backward = attention(3, 2, 40, 8, 4, window, 7)
    assert forward.work.flop == 2 * 2 * pairs * (8 + 4)
    assert backward.work.flop == 2 * 2 * pairs * (3 * 8 + 2 * 4)
    whole = attention(3, 2, 40, 8, 4, window or 40)
    for case, other in zip((forward, backward), whole, strict=True):
        assert case.work.bytes == other.work.bytes + 3 * 40 * 4
        assert case.work.flop < other.work.flop or window == 1
    assert visible_pairs_in_documents(torch.zeros(2, 40), window) == 2 * visible_pairs(40, window or 40)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [None, 4])
def test_ours_and_the_peer_are_given_the_documents(
    window: int | None, ops: Ops, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both outputs are those of the mask, and our backward can be run again."""

    def flex(*given: torch.Tensor, **options: Any) -> torch.Tensor:
        return flex_attention(*(tensor.detach() for tensor in given), **options)  # it has no backward on the CPU

    monkeypatch.setattr(op_attention, "_compiled_flex", lambda: flex)
    forward, backward = attention(2, 3, 16, 8, 8, window, 5)
    assert forward.op == backward.op == "document_attention"
    given: list[torch.Tensor] = []

    class Noting(Setting):
        def normal(self, *sizes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            given.append(torch.randn(*sizes, dtype=dtype))
            return given[-1]

    setting = Noting(ops, "cpu")
    hidden = ~seen(document_starts(2, 16, 5), window)[:, None]
    assert forward.peer is not None
    assert forward.peer.name == "FlexAttention"
    for make in (forward.make, forward.peer.make):
        given.clear()
        out = make(setting)()
        q, k, v = (tensor.transpose(1, 2) for tensor in given)
        expected = (q @ k.mT * 8**-0.5).masked_fill(hidden, float("-inf")).softmax(-1) @ v
        torch.testing.assert_close(out, expected)
    run = backward.make(setting)
    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))
