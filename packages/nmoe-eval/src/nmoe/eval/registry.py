"""Names of tasks, and what they stand for. Imports no torch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial

from nmoe.eval.errors import UnknownTaskError
from nmoe.eval.sources import Sources, Suite


@dataclass(frozen=True)
class Entry:
    """A task that can be asked for by name."""

    name: str
    version: str
    shots: str
    """Examples before an item, in words where tasks of it have different ones."""
    about: str
    load: Callable[[Sources], Suite]
    """Reads its data."""
    load_with_shots: Callable[[Sources, int], Suite] | None = None
    """With another number of examples; None: it has always its own."""


def entries() -> dict[str, Entry]:
    """All that can be asked for, by name."""
    from nmoe.eval.choice import load_choice
    from nmoe.eval.choice_tasks import choice_specs
    from nmoe.eval.core import VERSION, load_core
    from nmoe.eval.generation_tasks import load_gpqa, load_gsm8k, load_humaneval

    about = "the tasks of a CORE bundle and their mean centered accuracy; core/LABEL for one of them"
    listed = [Entry("core", VERSION, "0 to 10", about, load_core)]
    for spec in choice_specs().values():
        about = f"{spec.dataset}, {spec.split}; prompts of lm-evaluation-harness's {spec.harness}"
        load = partial(load_choice, spec)
        listed.append(Entry(spec.name, spec.version, str(spec.shots), about, load, load))

    def humaneval(sources: Sources) -> Suite:
        return load_humaneval(sources, unsafe_exec=sources.unsafe_exec)

    def humaneval_at_10(sources: Sources) -> Suite:
        return load_humaneval(
            sources, name="humaneval@10", n=10, temperature=0.8, ks=(1, 10), unsafe_exec=sources.unsafe_exec
        )

    programs = "openai/openai_humaneval; programs run in a sandbox;"
    listed += [
        Entry("gsm8k", "3.0", "5", "openai/gsm8k, test; greedy, the answer behind ####", load_gsm8k, load_gsm8k),
        Entry("humaneval", "1.0", "0", f"{programs} greedy, pass@1", humaneval),
        Entry("humaneval@10", "1.0", "0", f"{programs} 10 samples at temperature 0.8, pass@1 and @10", humaneval_at_10),
        Entry("gpqa", "2.2", "0", "Idavidrein/gpqa, main; greedy, step by step", load_gpqa),
    ]
    return {entry.name: entry for entry in listed}


def load_suites(names: Sequence[str], sources: Sources) -> dict[str, Suite]:
    """What the names stand for, with their data, in their order.

    Args:
        names: of entries, or `core/LABEL`; `NAME:SHOTS` for another number of examples.
        sources: where data may be.

    Raises:
        UnknownTaskError: there is no such task, with the closest name.
        MissingDataError: data is not to be had.
        TaskDataError: data is not as it should be.
    """
    loaders = {name: _loader(name) for name in dict.fromkeys(names)}  # all names are looked at before any data
    return {name: loader(sources) for name, loader in loaders.items()}


def check_names(names: Sequence[str]) -> None:
    """Refuses names that stand for nothing; looks at no data, and so believes any `core/LABEL`.

    Raises:
        UnknownTaskError: with the closest name.
    """
    for name in names:
        _loader(name)


def _loader(asked: str) -> Callable[[Sources], Suite]:
    name, colon, shots = asked.partition(":")
    group, slash, label = name.partition("/")
    known = entries()
    if group == "core" and slash:
        from nmoe.eval.core import load_core

        entry = Entry(name, "", "", "", partial(load_core, label=label))
    elif name in known:
        entry = known[name]
    else:
        close = get_close_matches(name, known, n=1)
        raise UnknownTaskError(
            f"expected one of {', '.join(known)}; found {name!r}" + (f": did you mean {close[0]!r}?" if close else "")
        )
    if not colon:
        return entry.load
    if not shots.isdecimal():
        raise UnknownTaskError(f"expected a number of examples behind 'NAME:', found {asked!r}")
    load = entry.load_with_shots
    if load is None:
        raise UnknownTaskError(f"expected {name} without a number of examples, since it has its own, found {asked!r}")
    number = int(shots)
    return lambda sources: load(sources, number)
