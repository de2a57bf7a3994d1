"""A user's own text from files to shards and back to a description."""

import json

import pytest
from nmoe.cli.config import load_config
from nmoe.cli.errors import ExitCode


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "texts.jsonl"
    documents = [f"Document {number}: " + "words and more words. " * number for number in range(40)]
    path.write_text("".join(json.dumps({"text": document, "body": "b"}) + "\n" for document in documents))
    return path


@pytest.fixture
def prepared(n, text, tmp_path):
    output = tmp_path / "mine"
    outcome = n("data", "prep", text, "--output", output)
    assert outcome.code == ExitCode.OK, outcome.err
    return output, outcome


def test_prep_tells_what_it_made_and_the_next_command(prepared):
    output, outcome = prepared
    assert "36 documents" in outcome.out
    assert "4 documents" in outcome.out
    assert "bits per byte, for a model to beat" in outcome.out
    assert f"n train configs/nano.toml --set data.path={output}" in outcome.out
    assert "\x1b" not in outcome.out


def test_the_next_commands_setting_loads(prepared, config_file):
    output, _ = prepared
    loaded = load_config(config_file(), [f"data.path={output}"], environ={})
    assert loaded.config.data.path == output


def test_verify_accepts_what_prep_made(n, prepared):
    output, _ = prepared
    outcome = n("data", "verify", output)
    assert outcome.code == ExitCode.OK
    assert [line.split(":")[0] for line in outcome.out.splitlines()] == [f"ok  {output}/train", f"ok  {output}/val"]


def test_verify_names_every_damaged_set_and_still_checks_the_others(n, prepared, tmp_path):
    output, _ = prepared
    shard = next((output / "train").glob("*.npy"))
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    outcome = n("data", "verify", tmp_path / "nothing", output)
    assert outcome.code == ExitCode.DATA
    assert str(shard) in outcome.err
    assert str(tmp_path / "nothing") in outcome.err
    assert outcome.out.startswith(f"ok  {output}/val")


def test_info_tells_the_manifest(n, prepared):
    output, _ = prepared
    outcome = n("data", "info", output)
    manifest = json.loads((output / "val" / "manifest.json").read_text())
    assert outcome.code == ExitCode.OK
    assert f"tokens       {manifest['n_tokens']:,}" in outcome.out
    assert "byte, 257 ids, end-of-text 256" in outcome.out
    assert outcome.out.count("fingerprint") == 2
    one = n("data", "info", output / "val")
    assert one.out.count("fingerprint") == 1


def test_options_of_prep(n, text, tmp_path):
    outcome = n("data", "prep", text, "--output", tmp_path / "o", "--text-key", "body", "--val-fraction", "0")
    assert outcome.code == ExitCode.OK
    assert "40 documents" in outcome.out
    assert "gzip" not in outcome.out
    assert not (tmp_path / "o" / "val").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["{text}", "--output", "{text}"], ExitCode.USAGE, "nothing is overwritten"),
        (["{text}", "--output", "{new}", "--tokenizer", "gpt5"], ExitCode.USAGE, "gpt5"),
        (["{text}", "--output", "{new}", "--val-fraction", "2"], ExitCode.USAGE, "val_fraction"),
        (["{text}", "--output", "{new}", "--val-fraction", "many"], ExitCode.USAGE, "--val-fraction"),
        (["{text}", "--output", "{new}", "--text-key", "txt"], ExitCode.DATA, "'txt'"),
        (["{text}"], ExitCode.USAGE, "--output"),
        (["{new}.txt", "--output", "{new}"], ExitCode.DATA, "Check the path"),
    ],
)
def test_mistakes_with_prep(n, text, tmp_path, arguments, code, words):
    places = {"text": text, "new": tmp_path / "new"}
    outcome = n("data", "prep", *[argument.format(**places) for argument in arguments])
    assert outcome.code == code
    assert words in outcome.err
    assert not (tmp_path / "new").exists()
