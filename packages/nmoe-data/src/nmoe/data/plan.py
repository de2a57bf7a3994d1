"""What a run draws from each source, before anything runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from nmoe.data.errors import PlanError
from nmoe.data.mixture import Mixture
from nmoe.data.schedule import Schedule, Shares, Span


@dataclass(frozen=True)
class Draw:
    """What one stage takes of one source."""

    source: str
    weight: Fraction
    """The share of the stage's samples, as it is drawn."""
    wanted: Fraction
    """As the mixture has it; another one where it had to be rounded."""
    samples: int
    tokens: int
    """Predicted tokens: samples of S."""


@dataclass(frozen=True)
class PlannedStage:
    """One stage of the plan."""

    name: str
    n_samples: int | None
    """None: it goes on as long as the run does."""
    counted: int
    """The samples that `draws` are of: of an endless stage, those of the run."""
    shares: Shares
    draws: tuple[Draw, ...]


@dataclass(frozen=True)
class SourceTotal:
    """What all stages up to the last planned one take of one source."""

    source: str
    samples: int
    tokens: int
    available: int | None
    """Tokens that are prepared; None: nothing yet."""
    epochs: float | None
    """How often each of its samples is seen; None where nothing is prepared."""
    max_epochs: float

    @property
    def warning(self) -> str | None:
        """What a person should know; None: nothing."""
        if self.available is None:
            return "not prepared"
        if self.epochs is not None and self.epochs > self.max_epochs:
            return f"repeats {self.epochs:.1f} times, more than {self.max_epochs:g}"
        return None


@dataclass(frozen=True)
class Plan:
    """Stages in their order, and what they take. Made by `make_plan`."""

    seq_len: int
    sources: tuple[str, ...]
    """Names, sorted: neither order of the mixture's file matters."""
    stages: tuple[PlannedStage, ...]
    """Up to the last one that is trained."""
    start: int
    """The number of the stage that global sample 0 belongs to; those before it are other runs'."""
    totals: tuple[SourceTotal, ...]

    @property
    def n_samples(self) -> int | None:
        """Samples that a run may take; None: as many as it likes."""
        lengths = [stage.n_samples for stage in self.stages[self.start :]]
        return None if None in lengths else sum(length for length in lengths if length is not None)

    def schedule(self) -> Schedule:
        """Which sample comes from where."""
        return Schedule([Span(stage.shares, stage.n_samples) for stage in self.stages], self.sources, self.start)

    def identity(self) -> dict[str, object]:
        """What of the plan decides the order of samples, as JSON. The last stage's length decides none: it may grow."""
        spans = [[dict(stage.shares.counts), stage.n_samples] for stage in self.stages]
        spans[-1][1] = None
        return {"start": self.start, "spans": spans}

    def check_stage(self, name: str) -> None:
        """Raises PlanError if there is no stage of that name."""
        _number([stage.name for stage in self.stages], name)

    def check_length(self, samples: int) -> None:
        """Raises PlanError if a run of so many samples goes beyond the last stage."""
        given = self.n_samples
        if given is not None and samples > given:
            last = self.stages[-1].name
            raise PlanError(
                f"the flow's stages {' and '.join(repr(stage.name) for stage in self.stages[self.start :])}",
                expected=f"{samples:,} samples of {self.seq_len} tokens, as the run's steps take",
                found=f"{given:,}",
                remedy=f"Lower train.steps, or raise the flow's tokens of {last!r}.",
            )


def make_plan(
    mixture: Mixture,
    tokens: Mapping[str, int | None],
    seq_len: int,
    *,
    budgets: Mapping[str, int] | None = None,
    stage: str | None = None,
    run_samples: int | None = None,
) -> Plan:
    """Plans the stages of a mixture.

    A stage of so many tokens has tokens // seq_len samples. Epochs count from the first stage on, whichever is trained:
    a stage begins where the one before it left every source.

    Args:
        mixture: sources and weights.
        tokens: what is prepared of each source; None: nothing yet.
        seq_len: S.
        budgets: tokens of each stage; None: the only stage has no end.
        stage: the one to train; None: all, one after the other.
        run_samples: what to count an endless stage's draws for; None: as many as once through what is prepared.

    Raises:
        PlanError: there is no such stage, or a stage is shorter than a sample, or several have no budgets.
        MixtureError: a source's size or weight is missing or too small.
    """
    names = [each.name for each in mixture.stages]
    last = len(names) - 1 if stage is None else _number(names, stage)
    if budgets is None and len(names) > 1:
        raise PlanError(
            "the mixture",
            expected="a flow, which says how long each stage is",
            found=f"{len(names)} stages and none",
            remedy="Set data.flow to a profile of configs/flow_profiles.toml.",
        )
    start = 0 if stage is None else last
    taken = dict.fromkeys(sorted(mixture.names), 0)
    stages = []
    for each in mixture.stages[: last + 1]:
        weights = mixture.weights(each, tokens)
        shares = Shares.of(weights)
        n_samples = None if budgets is None else budgets[each.name] // seq_len
        if n_samples == 0:
            raise PlanError(
                f"stage {each.name!r}",
                expected=f"at least {seq_len} tokens, one sample",
                found=str((budgets or {})[each.name]),
                remedy="Raise the flow's tokens, or lower train.seq_len.",
            )
        once = sum(known for known in tokens.values() if known is not None) // seq_len
        counted = n_samples if n_samples is not None else run_samples if run_samples is not None else once
        draws = tuple(
            Draw(name, Fraction(shares.counts[name], shares.period), weights[name], samples, samples * seq_len)
            for name, samples in shares.taken(counted).items()
        )
        for draw in draws:
            taken[draw.source] += draw.samples
        stages.append(PlannedStage(each.name, n_samples, counted, shares, draws))
    limits = {source.name: float(source.max_epochs or mixture.max_epochs) for source in mixture.source}
    drawn = {draw.source for each in stages for draw in each.draws}
    totals = tuple(
        _total(name, samples, tokens[name], seq_len, limits[name]) for name, samples in taken.items() if name in drawn
    )
    return Plan(seq_len, tuple(total.source for total in totals), tuple(stages), start, totals)


def _number(names: Sequence[str], stage: str) -> int:
    if stage not in names:
        raise PlanError(
            "the stage",
            expected=f"one of the mixture's ({', '.join(names)})",
            found=repr(stage),
            remedy="Name one of them, or none, for all.",
        )
    return names.index(stage)


def _total(name: str, samples: int, available: int | None, seq_len: int, limit: float) -> SourceTotal:
    per_epoch = None if available is None else (available - 1) // seq_len
    epochs = samples / per_epoch if per_epoch else None
    return SourceTotal(name, samples, samples * seq_len, available, epochs, limit)
