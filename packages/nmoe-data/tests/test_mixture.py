"""Files of mixtures and flows: what they say, and every mistake by file and key."""

from decimal import Decimal
from fractions import Fraction

import pytest
from nmoe.data.errors import MixtureError
from nmoe.data.mixture import read_budgets, read_mixture

TWO = """
[[source]]
name = "web"
path = "${ROOT}/web"
weight = 0.7

[[source]]
name = "code"
kind = "hf"
input = "some/code"
weight = 0.1
"""
STAGES = """
[[stage]]
name = "pretrain"

[[stage]]
name = "anneal"
weights = { code = 3, web = 1 }
"""


@pytest.fixture
def mixture(tmp_path):
    def write(text):
        path = tmp_path / "mixture.toml"
        path.write_text(text)
        return path

    return write


def test_a_mixture_says_what_its_file_says(mixture):
    read = read_mixture(mixture(TWO + STAGES), lambda text: text.replace("${ROOT}", "/data"))
    web, code = read.source
    assert (web.path, web.weight, web.input) == ("/data/web", Decimal("0.7"), ())
    assert (code.kind, code.input, code.split) == ("hf", ("some/code",), "train")
    assert [stage.name for stage in read.stages] == ["pretrain", "anneal"]
    unknown = {"web": None, "code": None}
    assert read.weights(read.stages[0], unknown) == {"web": Fraction(7, 8), "code": Fraction(1, 8)}
    assert read.weights(read.stages[1], unknown) == {"web": Fraction(1, 4), "code": Fraction(3, 4)}


def test_without_stages_there_is_one(mixture):
    assert [stage.name for stage in read_mixture(mixture(TWO)).stages] == ["pretrain"]


def test_a_temperature_goes_by_size(mixture):
    text = "temperature = 2\n" + TWO.replace("weight = 0.7", "").replace("weight = 0.1", "tokens = 100")
    read = read_mixture(mixture(text))
    weights = read.weights(read.stages[0], {"web": 900, "code": 7})
    assert weights["web"] == pytest.approx(3 / 4)
    assert sum(weights.values()) == 1
    with pytest.raises(MixtureError, match="source 'web': expected its number of tokens"):
        read.weights(read.stages[0], {"web": None, "code": None})


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("weight = 0.7", "weight = 0", "source[1].weight: Input should be greater than 0"),
        ("weight = 0.7", "weight = -0.5", "source[1].weight: Input should be greater than 0"),
        ("weight = 0.7", "weight = nan", "source[1].weight"),
        ("weight = 0.7", 'weight = "0.7"', "source[1].weight: expected a number, found '0.7'"),
        ("weight = 0.7", "wieght = 0.7", "source[1].wieght: unknown key"),
        ("weight = 0.7", "", "source 'web' has no weight, and stage 'pretrain' gives none"),
        ('name = "code"', 'name = "web"', "source 'web' stands twice"),
        ('name = "code"', 'name = "a/b"', "source[2].name"),
        ('kind = "hf"', 'kind = "csv"', "source[2].kind"),
        ('input = "some/code"', "", "expected a path (a prepared folder) or an input to prepare, found neither"),
        ("code = 3", "cod = 3", "stage 'anneal' weighs 'cod', which is no source"),
        ("code = 3", "code = 0", "stage[2].weights.code: Input should be greater than 0"),
        ("{ code = 3, web = 1 }", "{}", "stage 'anneal' weighs no source"),
        ("{ code = 3, web = 1 }", "{ web = 1 }\ntemperature = 2", "has weights and a temperature"),
        ("[[source]]", "temperature = 2\n[[source]]", "temperature and weights (web, code) exclude each other"),
        ("[[source]]", "[[source", "mixture.toml: expected the file of a mixture"),
    ],
)
def test_mistakes_are_named_by_file_and_key(mixture, old, new, words):
    path = mixture((TWO + STAGES).replace(old, new, 1))
    with pytest.raises(MixtureError) as error:
        read_mixture(path)
    assert str(path) in str(error.value)
    assert words in str(error.value)


def test_all_mistakes_come_at_once_and_no_others(mixture):
    with pytest.raises(MixtureError) as error:
        read_mixture(mixture(TWO.replace("0.7", "0").replace("0.1", "-1")))
    assert error.value.found == (
        "source[1].weight: Input should be greater than 0; source[2].weight: Input should be greater than 0"
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "source: Field required"),
        ("source = []", "source: expected at least one, found none"),
        ('[source]\nname = "web"', r"source: expected a list (of tables: [[…]])"),
    ],
)
def test_a_mixture_has_sources(mixture, text, words):
    with pytest.raises(MixtureError) as error:
        read_mixture(mixture(text))
    assert words in error.value.found


@pytest.mark.parametrize("temperature", ["0.01", "1e-400"])
def test_a_temperature_too_low_for_numbers_is_refused(mixture, temperature):
    text = f"temperature = {temperature}\n" + TWO.replace("weight = 0.7", "").replace("weight = 0.1", "")
    read = read_mixture(mixture(text))
    with pytest.raises(MixtureError, match=r"temperature: expected.*source 'web'. Raise it"):
        read.weights(read.stages[0], {"web": 900_000_000, "code": 7})


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(MixtureError, match="Check the path"):
        read_mixture(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[dev]\npretrain = 5\nanneal = 6", None),
        ("[proxy]\npretrain = 5", "expected one of its profiles (proxy), found 'dev'"),
        ("[dev]\npretrain = 5", "[dev]: expected tokens for every stage of the mixture, found none for 'anneal'"),
        ("[dev]\npretrain = 0\nanneal = 6", "dev.pretrain"),
        ("[dev]\npretrain = 0.5\nanneal = 6", "dev.pretrain"),
        ("dev = 5", "dev"),
    ],
)
def test_budgets(mixture, tmp_path, text, words):
    read = read_mixture(mixture(TWO + STAGES))
    path = tmp_path / "flows.toml"
    path.write_text(text)
    if words is None:
        assert read_budgets(path, "dev", read) == {"pretrain": 5, "anneal": 6}
        return
    with pytest.raises(MixtureError) as error:
        read_budgets(path, "dev", read)
    assert str(path) in str(error.value)
    assert words in str(error.value)
