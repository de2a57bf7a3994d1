import pytest
from nmoe.train.schedule import decay_steps, lr_factor
from nmoe.train.schema import ScheduleConfig

TOKENS = 100


def test_warms_up_linearly_holds_decays_linearly_and_stays_at_the_floor():
    schedule = ScheduleConfig(warmup_steps=4, hold_tokens=300, decay_tokens=400, decay_floor=0.2)
    factors = [lr_factor(schedule, step, TOKENS) for step in range(1, 15)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4:7] == [1.0, 1.0, 1.0]
    assert factors[7:11] == pytest.approx([0.8, 0.6, 0.4, 0.2])
    assert factors[11:] == pytest.approx([0.2, 0.2, 0.2])


def test_without_decay_the_rate_holds_for_ever():
    schedule = ScheduleConfig(hold_tokens=0)
    assert lr_factor(schedule, 1, TOKENS) == lr_factor(schedule, 10**9, TOKENS) == 1.0


def test_progress_is_in_tokens_not_steps():
    schedule = ScheduleConfig(hold_tokens=1000, decay_tokens=1000)
    assert lr_factor(schedule, 30, 50) == lr_factor(schedule, 15, 100) == pytest.approx(0.5)


@pytest.mark.parametrize("tokens", [100, 70, 33])
@pytest.mark.parametrize("warmup", [0, 4])
def test_rates_fall_between_the_steps_that_are_told(warmup, tokens):
    schedule = ScheduleConfig(warmup_steps=warmup, hold_tokens=300, decay_tokens=400, decay_floor=0.2)
    factor = {step: lr_factor(schedule, step, tokens) for step in range(1, 60)}
    falling, lowest = decay_steps(schedule, tokens)
    assert falling == min(step for step in factor if step > warmup and factor[step] < 1)
    assert lowest == min(step for step in factor if step > warmup and factor[step] == pytest.approx(0.2))
    assert decay_steps(ScheduleConfig(hold_tokens=300), tokens) is None
