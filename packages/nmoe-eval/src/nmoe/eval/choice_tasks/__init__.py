"""Choice tasks by name; each file words one dataset's items."""

from nmoe.eval.choice import ChoiceSpec


def choice_specs() -> dict[str, ChoiceSpec]:
    """All of them, in the order in which they are listed."""
    from nmoe.eval.choice_tasks.arc import ARC_CHALLENGE, ARC_EASY
    from nmoe.eval.choice_tasks.boolq import BOOLQ
    from nmoe.eval.choice_tasks.copa import COPA
    from nmoe.eval.choice_tasks.hellaswag import HELLASWAG
    from nmoe.eval.choice_tasks.mmlu import MMLU
    from nmoe.eval.choice_tasks.mmlu_pro import MMLU_PRO
    from nmoe.eval.choice_tasks.openbookqa import OPENBOOKQA
    from nmoe.eval.choice_tasks.winogrande import WINOGRANDE

    specs = (MMLU, MMLU_PRO, ARC_EASY, ARC_CHALLENGE, HELLASWAG, BOOLQ, OPENBOOKQA, WINOGRANDE, COPA)
    return {spec.name: spec for spec in specs}
