"""Choices with labels beside their texts, as ARC and OpenBookQA have them."""

from nmoe.eval.items import Item


def labelled_choices(item: Item) -> tuple[list[str], list[str]]:
    """Texts and labels."""
    of_choices = item["choices"]
    if not isinstance(of_choices, dict):
        raise item.error(f"expected an object under 'choices', found {of_choices!r}")
    inner = Item(item.path, item.line, of_choices)
    texts, labels = inner.texts("text"), inner.texts("label")
    if len(texts) != len(labels):
        raise item.error(f"expected as many labels as texts of choices, found {len(labels)} and {len(texts)}")
    return texts, labels


def label_index(item: Item, labels: list[str], answer: str) -> int:
    """Which of the labels the answer is."""
    if answer not in labels:
        raise item.error(f"expected one of the labels {', '.join(labels)} as the answer, found {answer!r}")
    return labels.index(answer)
