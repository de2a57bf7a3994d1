"""ARC, Easy and Challenge (arXiv:1803.05457)."""

from nmoe.eval.choice import ChoiceSpec, Question
from nmoe.eval.choice_tasks.labelled import label_index, labelled_choices
from nmoe.eval.items import Item


def _word(item: Item) -> Question:
    texts, labels = labelled_choices(item)
    gold = label_index(item, labels, item.text("answerKey"))
    return Question.of_choices(f"Question: {item.text('question')}\nAnswer:", texts, gold)


def _spec(name: str, config: str) -> ChoiceSpec:
    return ChoiceSpec(
        name=name,
        harness=name,
        version="1",
        dataset="allenai/ai2_arc",
        configs=(config,),
        split="test",
        shots_split="train",
        word=_word,
        n_choices=4,
    )


ARC_EASY, ARC_CHALLENGE = _spec("arc_easy", "ARC-Easy"), _spec("arc_challenge", "ARC-Challenge")
