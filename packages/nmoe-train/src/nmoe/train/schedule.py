"""The learning-rate schedule: warm-up, hold, decay (WSD, arXiv:2404.06395)."""

from nmoe.train.schema import ScheduleConfig


def lr_factor(schedule: ScheduleConfig, step: int, tokens_per_step: int) -> float:
    """Fraction of the full learning rate that the update of `step` uses.

    Args:
        schedule: the run's `[schedule]`.
        step: the update's number, from 1.
        tokens_per_step: predicted tokens of a global batch.
    """
    if step <= schedule.warmup_steps:
        return step / schedule.warmup_steps
    if schedule.decay_tokens == 0:
        return 1.0
    tokens = (step - schedule.warmup_steps) * tokens_per_step
    progress = min(max(tokens - schedule.hold_tokens, 0) / schedule.decay_tokens, 1.0)
    return 1.0 - progress * (1.0 - schedule.decay_floor)
