"""BoolQ (arXiv:1905.10044), as SuperGLUE has it."""

from nmoe.eval.choice import ChoiceSpec, Question
from nmoe.eval.items import Item


def _word(item: Item) -> Question:
    context = f"{item.text('passage')}\nQuestion: {item.text('question')}?\nAnswer:"
    return Question.of_choices(context, ("no", "yes"), item.index("label", 2))


BOOLQ = ChoiceSpec(
    name="boolq",
    harness="boolq",
    version="2",
    dataset="aps/super_glue",
    configs=("boolq",),
    split="validation",
    shots_split="train",
    word=_word,
    n_choices=2,
    has_test_split=False,
)
