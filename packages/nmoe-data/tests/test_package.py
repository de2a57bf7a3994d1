import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import nmoe.data
import pytest
from nmoe.data import errors

README = Path(__file__).resolve().parents[1] / "README.md"


def test_every_export_is_there():
    for name in nmoe.data.__all__:
        assert getattr(nmoe.data, name) is not None
    with pytest.raises(AttributeError, match="nothing"):
        nmoe.data.nothing


def test_importing_costs_nothing():
    program = "import sys, nmoe.data, nmoe.data.schema; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "numpy", "pyarrow", "tiktoken"} & set(loaded)


def test_every_error_is_one_of_ours():
    kinds = [kind for _, kind in inspect.getmembers(importlib.import_module("nmoe.data.errors"), inspect.isclass)]
    assert len(kinds) > 10
    assert all(issubclass(kind, errors.DataError) for kind in kinds)
    text = str(errors.SourceError("a.jsonl:3", expected="JSON", found="nothing", remedy="Mend it."))
    assert text == "a.jsonl:3: expected JSON, found nothing. Mend it."


def test_the_readme_works(tmp_path, monkeypatch):
    """Its snippets run one after the other, as a reader would try them."""
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(snippets) == 3
    names = {}
    for snippet in snippets:
        exec(snippet, names)
    assert (tmp_path / "data").is_dir()
