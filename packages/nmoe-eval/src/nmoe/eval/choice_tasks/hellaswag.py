"""HellaSwag (arXiv:1905.07830)."""

import re

from nmoe.eval.choice import ChoiceSpec, Question
from nmoe.eval.items import Item

_BRACKETED = re.compile(r"\[.*?\]")


def _word(item: Item) -> Question:
    context = f"{item.text('ctx_a')} {item.text('ctx_b').capitalize()}"
    endings = item.texts("endings")
    label = item["label"]
    if not str(label).isdecimal() or int(label) >= len(endings):
        raise item.error(f"expected a number from 0 to {len(endings) - 1} under 'label', found {label!r}")
    query = _clean(f"{item.text('activity_label')}: {context}")
    return Question.of_choices(query, [_clean(ending) for ending in endings], int(label))


def _clean(text: str) -> str:
    """Without the marks of WikiHow's part."""
    text = text.strip().replace(" [title]", ". ")
    return _BRACKETED.sub("", text).replace("  ", " ")


HELLASWAG = ChoiceSpec(
    name="hellaswag",
    harness="hellaswag",
    version="1",
    dataset="Rowan/hellaswag",
    configs=(None,),
    split="validation",
    shots_split="train",
    word=_word,
    n_choices=4,
    has_test_split=False,
)
