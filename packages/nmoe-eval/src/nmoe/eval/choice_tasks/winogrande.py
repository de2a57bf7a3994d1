"""WinoGrande (arXiv:1907.10641): how likely is the sentence's end after each way to fill its blank?"""

from nmoe.eval.choice import ChoiceSpec, Question
from nmoe.eval.items import Item


def _word(item: Item) -> Question:
    sentence, answer = item.text("sentence"), str(item["answer"])
    before, blank, after = sentence.partition("_")
    if not blank:
        raise item.error(f"expected a blank '_' under 'sentence', found {sentence!r}")
    if answer not in ("1", "2"):
        raise item.error(f"expected '1' or '2' under 'answer', found {item['answer']!r}")
    options = [before + item.text(key, empty=False) for key in ("option1", "option2")]
    return Question.of_contexts(options, after.strip(), int(answer) - 1)


WINOGRANDE = ChoiceSpec(
    name="winogrande",
    harness="winogrande",
    version="1",
    dataset="allenai/winogrande",
    configs=("winogrande_xl",),
    split="validation",
    shots_split="train",
    word=_word,
    n_choices=2,
    has_test_split=False,
)
