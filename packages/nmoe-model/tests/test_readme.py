"""What the package's README shows."""

import re
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"


def test_the_readme_works(capsys):
    """Its snippet runs as a reader would try it: counts, and five tokens or fewer."""
    (snippet,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    exec(snippet, {})
    counts, tokens = capsys.readouterr().out.splitlines()
    assert "total" in counts
    assert 0 < len(eval(tokens)) <= 5
