"""OpenBookQA (arXiv:1809.02789), without the book."""

from nmoe.eval.choice import ChoiceSpec, Question
from nmoe.eval.choice_tasks.labelled import label_index, labelled_choices
from nmoe.eval.items import Item


def _word(item: Item) -> Question:
    texts, labels = labelled_choices(item)
    gold = label_index(item, labels, item.text("answerKey").lstrip())
    return Question.of_choices(item.text("question_stem"), texts, gold)


OPENBOOKQA = ChoiceSpec(
    name="openbookqa",
    harness="openbookqa",
    version="1",
    dataset="allenai/openbookqa",
    configs=("main",),
    split="test",
    shots_split="train",
    word=_word,
    n_choices=4,
)
