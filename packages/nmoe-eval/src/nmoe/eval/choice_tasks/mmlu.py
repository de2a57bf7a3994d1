"""MMLU (arXiv:2009.03300), all subjects; its accuracy is over all questions."""

from nmoe.eval.choice import ChoiceSpec, Question
from nmoe.eval.items import Item

SUBJECTS = (
    "abstract_algebra",
    "anatomy",
    "astronomy",
    "business_ethics",
    "clinical_knowledge",
    "college_biology",
    "college_chemistry",
    "college_computer_science",
    "college_mathematics",
    "college_medicine",
    "college_physics",
    "computer_security",
    "conceptual_physics",
    "econometrics",
    "electrical_engineering",
    "elementary_mathematics",
    "formal_logic",
    "global_facts",
    "high_school_biology",
    "high_school_chemistry",
    "high_school_computer_science",
    "high_school_european_history",
    "high_school_geography",
    "high_school_government_and_politics",
    "high_school_macroeconomics",
    "high_school_mathematics",
    "high_school_microeconomics",
    "high_school_physics",
    "high_school_psychology",
    "high_school_statistics",
    "high_school_us_history",
    "high_school_world_history",
    "human_aging",
    "human_sexuality",
    "international_law",
    "jurisprudence",
    "logical_fallacies",
    "machine_learning",
    "management",
    "marketing",
    "medical_genetics",
    "miscellaneous",
    "moral_disputes",
    "moral_scenarios",
    "nutrition",
    "philosophy",
    "prehistory",
    "professional_accounting",
    "professional_law",
    "professional_medicine",
    "professional_psychology",
    "public_relations",
    "security_studies",
    "sociology",
    "us_foreign_policy",
    "virology",
    "world_religions",
)

_LETTERS = ("A", "B", "C", "D")


def _word(item: Item) -> Question:
    choices = item.texts("choices", empty=True)
    if len(choices) != len(_LETTERS):
        raise item.error(f"expected {len(_LETTERS)} texts under 'choices', found {len(choices)}")
    listed = "".join(f"{letter}. {choice}\n" for letter, choice in zip(_LETTERS, choices, strict=True))
    context = f"{item.text('question').strip()}\n{listed}Answer:"
    return Question.of_choices(context, _LETTERS, item.index("answer", len(_LETTERS)))


def _description(subject: str | None) -> str:
    words = (subject or "").replace("_", " ")
    return f"The following are multiple choice questions (with answers) about {words}.\n\n"


MMLU = ChoiceSpec(
    name="mmlu",
    harness="mmlu",
    version="1",
    dataset="cais/mmlu",
    configs=SUBJECTS,
    split="test",
    shots_split="dev",
    word=_word,
    n_choices=4,
    shots=5,
    sampler="first",
    description=_description,
)
