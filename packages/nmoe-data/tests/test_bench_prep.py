import json

import pytest
from nmoe.data.bench.prep import main


@pytest.mark.parametrize("released", ["gpt2"], indirect=True)
def test_the_bench_measures_and_tells(tmp_path, released, monkeypatch):
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": f"document {i} of some words " * 40}) + "\n" for i in range(30))
    )
    arguments = ["--input", str(tmp_path / "a.jsonl"), "--tokenizer", released.name, "--workers", "1"]
    assert main([*arguments, "--copies", "2", "--rounds", "1", "--output", str(tmp_path / "out.json")]) == 0
    results = json.loads((tmp_path / "out.json").read_text())
    assert str(tmp_path) not in json.dumps(results)
    speed = results["speed"][f"{released.name}, 1 workers"]
    n_tokens = 2 * sum(len(released.encode(f"document {i} of some words " * 40)) for i in range(30))
    assert speed["tiktoken"]["tokens"] == n_tokens
    assert speed["prep"]["tokens"] == n_tokens + 60, "with the end of each document"
    assert speed["prep_over_tiktoken"] > 0
    assert results["documents"] == 60
    assert set(results["memory"][released.name]) == {"1x", "10x"}
