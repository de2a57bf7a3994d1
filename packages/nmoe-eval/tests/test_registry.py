"""Names of tasks, and where their data comes from."""

import subprocess
import sys

import pytest
from nmoe.eval import datasets_local
from nmoe.eval.datasets_local import load_split
from nmoe.eval.errors import MissingDataError, UnknownTaskError
from nmoe.eval.registry import check_names, entries, load_suites
from nmoe.eval.sources import Sources


def test_every_task_is_listed_with_version_and_shots():
    listed = entries()
    wanted = "core mmlu mmlu_pro arc_easy arc_challenge hellaswag boolq openbookqa winogrande copa gsm8k humaneval gpqa"
    assert set(wanted.split()) <= set(listed)
    for name, entry in listed.items():
        assert entry.name == name
        assert entry.version
        assert entry.shots
        assert entry.about


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("helaswag", "did you mean 'hellaswag'"),
        ("core:5", "without a number of examples"),
        ("mmlu:x", "expected a number of examples behind 'NAME:', found 'mmlu:x'"),
        ("core/arc:3", "without a number of examples"),
        ("", "expected one of core, mmlu"),
    ],
)
def test_what_is_no_task_is_refused_before_any_data_is_read(name, told):
    with pytest.raises(UnknownTaskError, match=told):
        load_suites(["core", name], Sources())
    with pytest.raises(UnknownTaskError, match=told):
        check_names(["core", "core/anything", "mmlu:0", name])
    check_names(["core", "core/anything", "mmlu:0"])


def test_a_name_that_is_given_twice_is_one(tmp_path, write_jsonl):
    rows = [{"passage": "p", "question": "q", "label": 0}]
    write_jsonl(tmp_path / "super_glue" / "boolq" / "validation.jsonl", rows)
    assert list(load_suites(["boolq", "boolq"], Sources((tmp_path,), hub=False))) == ["boolq"]


def test_what_no_folder_has_comes_from_the_hub(tmp_path, monkeypatch):
    asked = []

    def load_dataset(path, config, *, split):
        asked.append((path, config, split))
        return iter([{"a": 1}, {"a": 2}])

    import datasets

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    split = load_split(Sources((tmp_path,)), "owner/name", "part", "test")
    assert asked == [("owner/name", "part", "test")]
    assert [item.fields for item in split.items] == [{"a": 1}, {"a": 2}]
    assert str(split.items[1].error("no")) == "owner/name (part), test, line 2: no"
    assert load_split(Sources(), "owner/name", None, "test").sha256 == split.sha256
    with pytest.raises(MissingDataError, match=r"owner/name/part.*owner/name,|name/part"):
        load_split(Sources((tmp_path,), hub=False), "owner/name", "part", "test")

    def fails(*args, **kwargs):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", fails)
    with pytest.raises(MissingDataError, match=r"or on the Hugging Face hub; found none: ConnectionError: no route$"):
        load_split(Sources(), "owner/name", None, "test")


def test_a_folder_goes_before_the_hub_and_a_config_before_the_whole(tmp_path, write_jsonl, monkeypatch):
    monkeypatch.setattr(datasets_local, "_from_hub", None)
    write_jsonl(tmp_path / "name" / "test.jsonl", [{"a": "whole"}])
    write_jsonl(tmp_path / "owner" / "name" / "part" / "data" / "test.jsonl", [{"a": "part"}])
    sources = Sources((tmp_path / "empty", tmp_path))
    assert load_split(sources, "owner/name", "part", "test").items[0].fields == {"a": "part"}
    assert load_split(sources, "owner/name", "other", "test").items[0].fields == {"a": "whole"}


def test_names_are_listed_without_torch():
    code = "import sys; from nmoe.eval.registry import entries; entries(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
