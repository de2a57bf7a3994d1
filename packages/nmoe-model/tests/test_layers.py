"""Position tables and the softmax scale, with YaRN as DeepSeek-V3 applies it."""

import math

import pytest
import torch
from nmoe.kernels.reference.rope import rope_frequencies
from nmoe.model.layers import RotaryEmbedding, softmax_scale
from nmoe.model.schema import YarnConfig

CPU = torch.device("cpu")


def yarn(**changes: float) -> YarnConfig:
    return YarnConfig(**({"factor": 40.0, "original_seq_len": 4096, "mscale": 1.0, "mscale_all_dim": 1.0} | changes))


def test_scale_without_yarn_is_that_of_the_width(tiny) -> None:
    assert softmax_scale(tiny("mla"), 192) == pytest.approx(192**-0.5, rel=1e-15)


@pytest.mark.parametrize("all_dim", [1.0, 0.5])
def test_yarn_squares_its_temperature_into_the_scale(tiny, all_dim: float) -> None:
    """Once for the query and once for the key; DeepSeek-V3's own is 192^-½ · 1.3689²."""
    config = tiny("mla", yarn=yarn(mscale_all_dim=all_dim))
    expected = (0.1 * all_dim * math.log(40) + 1) ** 2 / math.sqrt(192)
    assert softmax_scale(config, 192) == pytest.approx(expected, rel=1e-14)
    assert softmax_scale(config, 192) != pytest.approx(math.sqrt(expected / math.sqrt(192)), rel=1e-3), "not squared"


def test_tables_carry_the_ratio_of_the_two_mscales(tiny) -> None:
    """1 where they are equal, as released: the temperature is in the scale alone."""
    for mscale, all_dim in ((1.0, 1.0), (0.7, 1.3)):
        cos, sin = RotaryEmbedding(tiny("mla", yarn=yarn(mscale=mscale, mscale_all_dim=all_dim)))(0, 9, CPU)
        ratio = (0.1 * mscale * math.log(40) + 1) / (0.1 * all_dim * math.log(40) + 1)
        torch.testing.assert_close(cos**2 + sin**2, torch.full_like(cos, ratio**2))


@pytest.mark.parametrize("name", ["mla", "everything", "sdpa"])
def test_later_positions_continue_the_table(tiny, name: str) -> None:
    rope = RotaryEmbedding(tiny(name))
    whole = rope(0, 12, CPU)
    for part, table in zip(rope(5, 7, CPU), whole, strict=True):
        assert torch.equal(part, table[5:])


def test_plain_tables_are_of_the_configured_theta(tiny) -> None:
    config = tiny("sdpa", rope_theta=500.0)
    cos, _ = RotaryEmbedding(config)(0, 4, CPU)
    assert torch.equal(cos[1], rope_frequencies(config.head_dim, 500.0).cos())


def test_tables_are_no_state(tiny, build) -> None:
    assert not any("rope" in name for name in build(tiny()).state_dict())
