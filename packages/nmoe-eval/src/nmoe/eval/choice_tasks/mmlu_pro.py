"""MMLU-Pro (arXiv:2406.01574), its options as choices."""

import string

from nmoe.eval.choice import ChoiceSpec, Question
from nmoe.eval.choice_tasks.labelled import label_index
from nmoe.eval.items import Item


def _word(item: Item) -> Question:
    options = item.texts("options")
    if len(options) > len(string.ascii_uppercase):
        raise item.error(f"expected an option a letter, found {len(options)}")
    letters = list(string.ascii_uppercase[: len(options)])
    listed = "".join(f"{letter}. {option}\n" for letter, option in zip(letters, options, strict=True))
    gold = label_index(item, letters, item.text("answer"))
    return Question.of_choices(f"{item.text('question')}\n{listed}Answer:", letters, gold)


MMLU_PRO = ChoiceSpec(
    name="mmlu_pro",
    harness="leaderboard_mmlu_pro",
    version="0.1",
    dataset="TIGER-Lab/MMLU-Pro",
    configs=(None,),
    split="test",
    shots_split="validation",
    word=_word,
    n_choices=10,
    shots=5,
    sampler="first",
)
