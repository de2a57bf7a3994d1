"""The learning-rate schedule: warm-up, hold, decay (WSD, arXiv:2404.06395)."""

from nmoe.train.schema import ScheduleConfig, TrainingConfig


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


def decay_steps(schedule: ScheduleConfig, tokens_per_step: int) -> tuple[int, int] | None:
    """The first step below the full learning rate after warm-up, and the first at the floor; None: it never falls."""
    if schedule.decay_tokens == 0:
        return None
    falling = schedule.hold_tokens // tokens_per_step + 1
    lowest = -(-(schedule.hold_tokens + schedule.decay_tokens) // tokens_per_step)
    return schedule.warmup_steps + falling, schedule.warmup_steps + lowest


def schedule_mismatch(config: TrainingConfig) -> str | None:
    """What is odd about `train.steps` beside `[schedule]`; None: nothing is."""
    decay, steps = decay_steps(config.schedule, config.tokens_per_step), config.train.steps
    if decay is None:
        return None
    falling, lowest = decay
    if steps < lowest:
        return (
            f"The run ends at step {steps}, and learning rates would fall from step {falling} to {lowest} ([schedule])"
        )
    if steps > lowest and config.schedule.decay_floor == 0:
        return (
            f"Learning rates are 0 from step {lowest} on ([schedule]), and the run goes on to step {steps}: set "
            f"train.steps = {lowest}, or more schedule.hold_tokens"
        )
    return None
