"""COPA (Roemmele et al. 2011), as SuperGLUE has it."""

from nmoe.eval.choice import ChoiceSpec, Question
from nmoe.eval.items import Item

_CONNECTORS = {"cause": "because", "effect": "therefore"}


def _word(item: Item) -> Question:
    asked = item.text("question")
    if asked not in _CONNECTORS:
        raise item.error(f"expected 'cause' or 'effect' under 'question', found {asked!r}")
    # Without its full stop.
    context = f"{item.text('premise', empty=False).strip()[:-1]} {_CONNECTORS[asked]}"
    choices = [item.text(key, empty=False) for key in ("choice1", "choice2")]
    return Question.of_choices(context, [f" {each[0].lower()}{each[1:]}" for each in choices], item.index("label", 2))


COPA = ChoiceSpec(
    name="copa",
    harness="copa",
    version="1",
    dataset="aps/super_glue",
    configs=("copa",),
    split="validation",
    shots_split="train",
    word=_word,
    n_choices=2,
    has_test_split=False,
)
