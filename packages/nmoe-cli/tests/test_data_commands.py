"""A user's own text from files to shards and back to a description."""

import base64
import json
import shutil

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


@pytest.mark.parametrize(("options", "checked"), [([], "ok, sizes"), (["--checksums"], "ok, every byte")])
def test_verify_accepts_what_prep_made(n, prepared, options, checked):
    output, _ = prepared
    outcome = n("data", "verify", output, *options)
    assert outcome.code == ExitCode.OK
    rows = outcome.out.splitlines()[1:3]
    assert [row.split()[0] for row in rows] == [f"{output}/train", f"{output}/val"]
    assert all(row.endswith(checked) for row in rows)
    assert ("--checksums" in outcome.out) == (not options)


def test_verify_names_every_damaged_set_and_still_checks_the_others(n, prepared, tmp_path):
    output, _ = prepared
    shard = next((output / "train").glob("*.npy"))
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    outcome = n("data", "verify", "--checksums", tmp_path / "nothing", output)
    assert outcome.code == ExitCode.DATA
    assert str(shard) in outcome.err
    assert str(tmp_path / "nothing") in outcome.err
    found = {line.split()[0]: line.rsplit("  ", 1)[1] for line in outcome.out.splitlines()[1:]}
    states = {output / "train": "DAMAGED", output / "val": "ok, every byte", tmp_path / "nothing": "DAMAGED"}
    assert found == {str(path): state for path, state in states.items()}
    shard.unlink()
    assert n("data", "verify", output).code == ExitCode.DATA, "a missing file shows without reading any"


def test_info_tells_the_manifest(n, prepared):
    output, _ = prepared
    outcome = n("data", "info", output)
    manifest = json.loads((output / "val" / "manifest.json").read_text())
    assert outcome.code == ExitCode.OK
    assert f"tokens       {manifest['n_tokens']:,}" in outcome.out
    assert "byte, 257 ids, end-of-text 256" in outcome.out
    assert "kind jsonl, files 1" in outcome.out
    assert "nmoe-data 0" in outcome.out
    assert "val_fraction 0.1" in outcome.out
    assert manifest["tokenizer"]["fingerprint"] in outcome.out
    assert outcome.out.count("\nfingerprint") == 2
    one = n("data", "info", output / "val")
    assert one.out.count("\nfingerprint") == 1


def test_show_gives_a_documents_text_back(n, prepared):
    output, _ = prepared
    outcome = n("data", "show", output, "--doc", 0)
    assert outcome.code == ExitCode.OK
    # Document 0 is validation's; training begins with the next.
    assert outcome.out.endswith("\n\nDocument 1: words and more words. <|endoftext|>\n")
    assert "of      36 documents" in outcome.out
    assert "Document 10: words" in n("data", "show", output / "val", "--doc", 1).out


def test_show_tells_a_samples_documents(n, prepared):
    output, _ = prepared
    outcome = n("data", "show", output, "--sample", 1, "--seq-len", 100)
    whole = "".join(f"Document {i}: " + "words and more words. " * i + "\0" for i in range(40) if i % 10)
    assert outcome.out.endswith("\n\n" + whole[100:201].replace("\0", "<|endoftext|>") + "\n")
    first = outcome.out.splitlines()[1].split("  ")
    assert "100 to" in outcome.out.splitlines()[1], first


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], ExitCode.USAGE, "neither"),
        (["--doc", "1", "--sample", "1"], ExitCode.USAGE, "both"),
        (["--doc", "36"], ExitCode.DATA, "0 to 35"),
        (["--sample", "10000"], ExitCode.DATA, "tokens"),
        (["--sample", "0", "--seq-len", "0"], ExitCode.USAGE, "--seq-len"),
        (["--doc", "0", "--tokenizer", "gpt5"], ExitCode.USAGE, "gpt5"),
    ],
)
def test_mistakes_with_show(n, prepared, arguments, code, words):
    outcome = n("data", "show", prepared[0], *arguments)
    assert outcome.code == code
    assert words in outcome.err


def test_show_asks_for_the_file_of_a_local_tokenizer(n, text, tmp_path):
    file = tmp_path / "mine.tiktoken"
    file.write_text("".join(f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(256)))
    n("data", "prep", text, "--tokenizer", file, "--output", tmp_path / "o")
    outcome = n("data", "show", tmp_path / "o", "--doc", 0)
    assert outcome.code == ExitCode.USAGE
    assert "was a local file: name the .tiktoken file with --tokenizer" in outcome.err
    assert "Document 1: words" in n("data", "show", tmp_path / "o", "--doc", 0, "--tokenizer", file).out


def test_show_lets_no_document_act_on_the_terminal(n, tmp_path):
    (tmp_path / "evil.txt").write_text("before \x1b[31m\x07 after\r\n")
    n("data", "prep", tmp_path / "evil.txt", "--output", tmp_path / "o", "--val-fraction", "0")
    out = n("data", "show", tmp_path / "o", "--doc", 0).out
    assert "before \ufffd[31m\ufffd after\n" in out


def test_options_of_prep(n, text, tmp_path):
    outcome = n("data", "prep", text, "--output", tmp_path / "o", "--text-key", "body", "--val-fraction", "0")
    assert outcome.code == ExitCode.OK
    assert "40 documents" in outcome.out
    assert "gzip" not in outcome.out
    assert not (tmp_path / "o" / "val").exists()


def test_more_options_of_prep(n, text, tmp_path):
    doubled = tmp_path / "doubled.json"
    doubled.write_text(text.read_text() * 2)
    options = ["--source", "jsonl", "--input", doubled, "--dedupe", "--workers", "2", "--shard-tokens", "1k"]
    outcome = n("data", "prep", *options, "--output", tmp_path / "o")
    assert outcome.code == ExitCode.OK, outcome.err
    assert "36 documents" in outcome.out
    assert "40 documents left out" in outcome.out
    assert "2 workers" in outcome.out
    assert len(list((tmp_path / "o" / "train").glob("*.npy"))) > 5
    outcome = n("data", "prep", text, "--output", tmp_path / "few", "--max-tokens", "1.5k")
    manifests = [json.loads(path.read_text()) for path in (tmp_path / "few").rglob("manifest.json")]
    assert 1500 <= sum(manifest["n_tokens"] for manifest in manifests) < 2500
    assert "max_tokens 1500" in n("data", "info", tmp_path / "few").out


def test_an_interrupt_says_how_to_go_on(n, text, tmp_path, monkeypatch):
    import nmoe.data.blocks
    import nmoe.data.readers

    monkeypatch.setattr(nmoe.data.readers, "BLOCK_BYTES", 2000)
    monkeypatch.setattr(nmoe.data.readers, "_CHUNK", 1000)
    real, made = nmoe.data.blocks.JsonlBlock.documents, []

    def documents(block):
        made.append(block)
        if len(made) == 4:
            raise KeyboardInterrupt
        return real(block)

    monkeypatch.setattr(nmoe.data.blocks.JsonlBlock, "documents", documents)
    outcome = n("data", "prep", text, "--output", tmp_path / "o")
    assert outcome.code == ExitCode.INTERRUPTED
    assert f"The work so far is in {tmp_path / 'o.partial'}: run the same command again to go on." in outcome.err
    other = n("data", "prep", text, "--output", tmp_path / "o", "--val-fraction", "0.5")
    assert other.code == ExitCode.USAGE
    assert "val_fraction" in other.err
    outcome = n("data", "prep", text, "--output", tmp_path / "o")
    assert outcome.code == ExitCode.OK
    assert "Going on in" in outcome.err
    assert "36 documents" in outcome.out
    assert not (tmp_path / "o.partial").exists()


def test_a_line_to_mend_comes_with_what_becomes_of_the_work(n, text, tmp_path, monkeypatch):
    import nmoe.data.readers

    monkeypatch.setattr(nmoe.data.readers, "BLOCK_BYTES", 2000)
    monkeypatch.setattr(nmoe.data.readers, "_CHUNK", 1000)
    lines = text.read_text()
    text.write_text(lines + "{no JSON\n")
    outcome = n("data", "prep", text, "--output", tmp_path / "o", "--workers", "1")
    assert outcome.code == ExitCode.DATA
    assert "Mend the line" in outcome.err
    assert f"{tmp_path / 'o.partial'}: it is of the source as it was, so delete that folder if you mend" in outcome.err
    assert "delete that folder" not in n("data", "prep", tmp_path / "mistyped.jsonl", "--output", tmp_path / "o").err
    text.write_text(lines)
    assert "delete that folder to start anew" in n("data", "prep", text, "--output", tmp_path / "o").err
    shutil.rmtree(tmp_path / "o.partial")
    assert n("data", "prep", text, "--output", tmp_path / "o").code == ExitCode.OK


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["{text}", "--output", "{text}"], ExitCode.USAGE, "nothing is overwritten"),
        (["{text}", "--output", "{new}", "--tokenizer", "gpt5"], ExitCode.USAGE, "gpt5"),
        (["{text}", "--output", "{new}", "--val-fraction", "2"], ExitCode.USAGE, "val_fraction"),
        (["{text}", "--output", "{new}", "--val-fraction", "many"], ExitCode.USAGE, "--val-fraction"),
        (["{text}", "--output", "{new}", "--text-key", "txt"], ExitCode.DATA, "'txt'"),
        (["{text}", "--output", "{new}", "--max-tokens", "many"], ExitCode.USAGE, "--max-tokens"),
        (["{text}", "--output", "{new}", "--shard-tokens", "-5"], ExitCode.USAGE, "--shard-tokens"),
        (["{text}", "--output", "{new}", "--workers", "0"], ExitCode.USAGE, "workers"),
        (["{text}", "--output", "{new}", "--source", "csv"], ExitCode.USAGE, "csv"),
        (["{text}", "--output", "{new}", "--split", "test"], ExitCode.USAGE, "split"),
        (["--output", "{new}"], ExitCode.USAGE, "at least one"),
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
    assert not (tmp_path / "new.partial").exists()
