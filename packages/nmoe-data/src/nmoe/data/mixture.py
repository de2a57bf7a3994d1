"""What to train on in which proportions: the files of mixtures and of flows. Imports no tokenizer and no torch."""

import tomllib
from collections.abc import Callable, Mapping
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from nmoe.data.errors import MixtureError
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveInt,
    RootModel,
    ValidationError,
    field_validator,
    model_validator,
)

ONLY_STAGE = "pretrain"
"""The name of the one stage of a mixture that lists none."""

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
Model = TypeVar("Model", bound=BaseModel)


def _number(value: Any) -> Any:
    """TOML's integers and decimals, exactly; strict as the rest of a configuration is."""
    if isinstance(value, bool) or not isinstance(value, int | Decimal):
        raise ValueError(f"expected a number, found {value!r}")
    return Decimal(value)


Positive = Annotated[Decimal, BeforeValidator(_number), Field(gt=0, allow_inf_nan=False)]


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class MixtureSource(_Table):
    """One source of text: a folder that `n data prep` wrote, or what is needed to prepare it."""

    name: Name
    """Also draws the order of its samples: another name is another order."""
    path: str | None = None
    """The prepared folder; absent: `n data prep-mixture` makes it, from the keys below."""
    kind: Literal["hf", "parquet", "jsonl", "text"] | None = None
    """What `input` is, as `n data prep --source` takes it; absent: told by the suffix."""
    input: tuple[str, ...] = ()
    """A data set's name, files, globs or URLs."""
    text_key: str = "text"
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    weight: Positive | None = None
    """Its share of the samples, before all weights are divided by their sum."""
    tokens: PositiveInt | None = None
    """How large the source is, for `temperature`; absent: the tokens that are prepared."""
    max_epochs: Positive | None = None
    """Epochs above which the plan warns; absent: the mixture's."""

    @field_validator("input", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _is_somewhere(self) -> Self:
        if self.path is None and not self.input:
            raise ValueError("expected a path (a prepared folder) or an input to prepare, found neither")
        return self


class MixtureStage(_Table):
    """A part of the training with weights of its own, which lasts as long as the flow says."""

    name: Name
    weights: dict[str, Positive] | None = None
    """Weight by source; a source that is not named gives nothing. Absent: the sources' own weights."""
    temperature: Positive | None = None
    """Instead of weights: each source's is its number of tokens to the power of 1/temperature."""


class Mixture(_Table):
    """Sources, and how much of each. Read by `read_mixture`."""

    source: tuple[MixtureSource, ...]
    """At least one."""
    stage: tuple[MixtureStage, ...] = ()
    """In their order. None: one stage, `pretrain`, with the sources' weights or the temperature."""
    temperature: Positive | None = None
    """For the stages that say nothing of their own, instead of the sources' weights."""
    max_epochs: Positive = Decimal(4)
    """Epochs of a source above which the plan warns: repeats up to four cost little (Muennighoff et al., 2023)."""
    val_fraction: Annotated[Decimal, BeforeValidator(_number), Field(ge=0, lt=1)] = Decimal("0.01")
    """Part of each source's documents that `n data prep-mixture` keeps for validation."""

    @field_validator("source", "stage", mode="before")
    @classmethod
    def _tuples(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        problems = [] if self.source else ["source: expected at least one, found none"]
        for kind, names in (("source", self.names), ("stage", [stage.name for stage in self.stage])):
            twice = sorted({name for name in names if names.count(name) > 1})
            problems += [f"{kind} {name!r} stands twice: names must differ" for name in twice]
        weighed = [source.name for source in self.source if source.weight is not None]
        if self.temperature is not None and weighed:
            problems.append(f"temperature and weights ({', '.join(weighed)}) exclude each other: leave one out")
        for stage in self.stages:
            if stage.weights is not None and stage.temperature is not None:
                problems.append(f"stage {stage.name!r} has weights and a temperature: leave one out")
            unknown = [name for name in stage.weights or () if name not in self.names]
            problems += [f"stage {stage.name!r} weighs {name!r}, which is no source" for name in unknown]
            if stage.weights is not None and not stage.weights:
                problems.append(f"stage {stage.name!r} weighs no source")
            if stage.weights is None and stage.temperature is None and self.temperature is None:
                lacking = [source.name for source in self.source if source.weight is None]
                problems += [f"source {name!r} has no weight, and stage {stage.name!r} gives none" for name in lacking]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def names(self) -> list[str]:
        """Of the sources, as the file lists them."""
        return [source.name for source in self.source]

    @property
    def stages(self) -> tuple[MixtureStage, ...]:
        """At least one."""
        return self.stage or (MixtureStage(name=ONLY_STAGE),)

    def weights(self, stage: MixtureStage, tokens: Mapping[str, int | None]) -> dict[str, Fraction]:
        """The share of each source that the stage draws from; they sum to 1.

        Args:
            stage: one of `stages`.
            tokens: what is prepared of each source; None: nothing yet.

        Raises:
            MixtureError: a temperature goes by the size of a source that nobody knows, or is too low for numbers.
        """
        if stage.weights is not None:
            given = {name: Fraction(weight) for name, weight in stage.weights.items()}
        elif (temperature := stage.temperature or self.temperature) is not None:
            given = {source.name: _tempered(source, tokens[source.name], temperature) for source in self.source}
        else:
            given = {source.name: Fraction(source.weight) for source in self.source if source.weight is not None}
        total = sum(given.values())
        return {name: weight / total for name, weight in given.items()}


def _tempered(source: MixtureSource, prepared: int | None, temperature: Decimal) -> Fraction:
    size = source.tokens or prepared
    if size is None:
        raise MixtureError(
            f"source {source.name!r}",
            expected="its number of tokens, which a temperature goes by",
            found="none, and nothing prepared",
            remedy="Add tokens = … to the source, or give weights.",
        )
    try:
        return Fraction(float(size) ** (1.0 / float(temperature)))
    except (OverflowError, ZeroDivisionError) as error:
        raise MixtureError(
            "temperature",
            expected="such that tokens to the power of 1/temperature are a number",
            found=f"{temperature}, with {size:,} tokens of source {source.name!r}",
            remedy="Raise it: with 1, weights are as the sizes are.",
        ) from error


class Flows(RootModel[dict[str, dict[str, PositiveInt]]]):
    """Token budgets: profile, stage, tokens. Read by `read_flows`."""

    model_config = ConfigDict(frozen=True, strict=True)


def read_mixture(path: Path, expand: Callable[[str], str] = str) -> Mixture:
    """Read a mixture's file. `expand` replaces placeholders in its paths and inputs.

    Raises MixtureError, which names the file and each key at fault.
    """
    mixture = _read(path, Mixture, "a mixture")
    sources = tuple(
        source.model_copy(
            update={
                "path": None if source.path is None else expand(source.path),
                "input": tuple(expand(name) for name in source.input),
            }
        )
        for source in mixture.source
    )
    return mixture.model_copy(update={"source": sources})


def read_budgets(path: Path, profile: str, mixture: Mixture) -> dict[str, int]:
    """The token budget of each stage of `mixture` in a profile of the flows' file.

    Raises MixtureError if the file makes no sense, or has no such profile, or says nothing of a stage.
    """
    flows = _read(path, Flows, "flow profiles").root
    if profile not in flows:
        raise MixtureError(
            str(path),
            expected=f"one of its profiles ({', '.join(flows)})",
            found=repr(profile),
            remedy="Name another flow, or add a table of that name.",
        )
    lacking = [stage.name for stage in mixture.stages if stage.name not in flows[profile]]
    if lacking:
        raise MixtureError(
            f"{path}: [{profile}]",
            expected="tokens for every stage of the mixture",
            found=f"none for {', '.join(map(repr, lacking))}",
            remedy=f"Add {lacking[0]} = 100_000_000 or another number to [{profile}].",
        )
    return {stage.name: flows[profile][stage.name] for stage in mixture.stages}


def _read(path: Path, model: type[Model], kind: str) -> Model:
    expected, remedy = f"the file of {kind}", "Mend the file; docs/data.md shows one."
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"), parse_float=Decimal)
        return model.model_validate(content)
    except OSError as error:
        raise MixtureError(str(path), expected=expected, found=str(error), remedy="Check the path.") from error
    except ValidationError as error:
        problems = "; ".join(_problem(detail["loc"], detail["msg"]) for detail in error.errors())
        raise MixtureError(str(path), expected=expected, found=problems, remedy=remedy) from error
    except ValueError as error:  # no TOML, no UTF-8
        raise MixtureError(str(path), expected=expected, found=str(error), remedy=remedy) from error


def _problem(location: tuple[int | str, ...], message: str) -> str:
    """`source[2].weight: …`, counted from 1."""
    key = ""
    for part in location:
        key += f"[{part + 1}]" if isinstance(part, int) else f".{part}" if key else part
    message = message.removeprefix("Value error, ")
    message = {
        "Extra inputs are not permitted": "unknown key",
        "Input should be a valid tuple": "expected a list (of tables: [[…]])",
    }.get(message, message)
    return f"{key}: {message}" if key else message
