"""A run's rates as JSON: medians of what was recorded, and nothing in it that names a machine's folders or devices."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from nmoe.train.bench import BenchError, main, summarise
from nmoe.train.metrics import MetricsWriter

GPU = {"name": "NVIDIA H200", "uuid": "GPU-0b1c-77", "memory.total": "143771 MiB", "driver_version": "570.1"}


def make_run(folder: Path, command: list[str], device: str, data: str = "/srv/people/me/data/mine") -> Path:
    env = {
        "command": command,
        "python": {"version": "3.12.1"},
        "packages": {"torch": "2.9.0", "rich": "14.0"},
        "cpu": {"name": "Some CPU", "count": 48},
        "gpus": [GPU],
        "git": None,
    }
    folder.mkdir()
    (folder / "env.json").write_text(json.dumps(env))
    (folder / "config.toml").write_text(
        f'[train]\nsteps = 4\n\n[data]\npath = "{data}"\ntokenizer = "byte"\n\n[runtime]\ndevice = "{device}"\n'
    )
    writer = MetricsWriter(folder / "metrics")
    for step, ms in ((1, 900.0), (2, 10.0), (3, 30.0), (4, 20.0)):
        writer.write(step, {"train/loss": 5.0 - step, "perf/ms_step": ms})
    writer.close()
    return folder


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["/home/me/.venv/bin/python3", "/home/me/.venv/bin/n", "train", "configs/a.toml"], "n train configs/a.toml"),
        (["/usr/bin/python3.12", "-X", "dev", "-I", "/opt/bin/n", "train", "a.toml"], "n train a.toml"),
        (["python", "-m", "nmoe.cli", "train", "/home/me/project/configs/a.toml"], "n train configs/a.toml"),
        (["python", "-m", "other.tool", "x"], "python -m other.tool x"),
        (["/usr/bin/python3", "-c", "open('/home/me/x')"], "python -c …"),
        (
            ["python", "/b/n", "train", "a.toml", "--set", "data.path=/home/me/text/mine", "--run-id", "x"],
            "n train a.toml --set data.path=text/mine --run-id x",
        ),
        (
            ["python", "/b/n", "train", "a.toml", "--set", 'data.path="/home/me/my text/mine"'],
            "n train a.toml --set 'data.path=\"my text/mine\"'",
        ),
        (["/b/n", "train", "a.toml", "--from=/home/me/imported"], "n train a.toml --from=me/imported"),
        (["/b/n", "train", "../rel/a.toml", "--set", "optim.lr=1/2"], "n train ../rel/a.toml --set optim.lr=1/2"),
    ],
)
def test_the_command_is_told_without_the_machines_folders(tmp_path: Path, words: list[str], expected: str) -> None:
    assert summarise(make_run(tmp_path / "run", words, "cpu"), 3)["command"] == expected


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_is_for_commit_names_neither_folders_nor_devices(tmp_path: Path, device: str) -> None:
    run = make_run(
        tmp_path / "run", ["/home/me/.venv/bin/python", "/home/me/.venv/bin/n", "train", "/etc/a.toml"], device
    )
    done = subprocess.run(
        [sys.executable, "-m", "nmoe.train.bench", str(run), "--last", "3"], capture_output=True, text=True, check=True
    )
    for secret in ("/home", ".venv", "/srv", "people", "uuid", GPU["uuid"], str(tmp_path)):
        assert secret not in done.stdout
    summary: dict[str, Any] = json.loads(done.stdout)
    assert summary["config"]["data"]["path"] == "data/mine"
    if device == "cpu":  # the GPUs beside it did nothing
        assert summary["machine"] == {"cpu": "Some CPU", "cpu_count": 48}
    else:
        assert summary["machine"] == [{key: value for key, value in GPU.items() if key != "uuid"}]


def test_rates_are_medians_over_the_last_steps(tmp_path: Path) -> None:
    summary = summarise(make_run(tmp_path / "run", ["n", "train"], "cpu"), 3)
    assert summary["perf/ms_step"] == 20.0
    assert summary["steps"] == 4
    assert summary["train/loss"]["1"] == 4.0


def test_medians_over_more_steps_than_there_are_are_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", ["n", "train"], "cpu")
    assert summarise(run, 4)["medians_over_last_steps"] == 4
    with pytest.raises(BenchError, match=r"at least 5 recorded steps.*found 4"):
        summarise(run, 5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["missing"], "missing: expected a configuration (.toml) or the folder of a run, found nothing there"),
        (["missing.toml"], "found nothing there"),
        (["notes.txt"], "found a file of another kind there"),
        (["other"], "found another folder there"),
        (["run"], "expected at least 100 recorded steps, for medians over so many, found 4: a smaller --last"),
        (["run", "--last", "4", "--steps", "4"], "expected --steps and --set with a configuration alone, found a run"),
        (["run", "--last", "4", "--set", "train.steps=5"], "expected --steps and --set with a configuration alone"),
        (["small.toml", "--steps", "20", "--last", "21"], "expected --last of at most the 20 --steps, found 21"),
        (["small.toml", "--last", "201"], "expected --last of at most the 200 --steps, found 201"),
        (["small.toml", "--steps", "0"], "expected a number of steps, found '0'"),
        (["run", "--last", "-1"], "expected a number of steps, found '-1'"),
        (["run", "--last", "4", "--output", "no/result.json"], "--output no/result.json: expected an existing folder"),
    ],
)
def test_what_cannot_be_is_said_before_anything_runs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "run", ["n", "train"], "cpu")
    (tmp_path / "small.toml").write_text("")
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "other").mkdir()
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    with pytest.raises(SystemExit) as ended:
        main(words)
    said = capsys.readouterr()
    assert ended.value.code == 2
    assert said.out == ""
    assert message in said.err


def test_the_result_goes_to_the_file_that_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", ["n", "train"], "cpu")
    main([str(run), "--last", "3", "--output", str(tmp_path / "result.json")])
    assert json.loads((tmp_path / "result.json").read_text())["perf/ms_step"] == 20.0
    assert capsys.readouterr().out == ""
