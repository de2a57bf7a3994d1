"""`n data prep` that is killed again and again ends with the bytes of one that was not."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

# State is saved often enough for a run of a second to be killed at many of them.
PROGRAM = "import nmoe.data.prep as p; p.SAVE_GAP_S = 0.02; from nmoe.cli.app import main; main()"


def start(folder: Path, name: str, workers: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-u", "-c", PROGRAM, "data", "prep", str(folder / "texts.jsonl"), "--dedupe"]
    command += ["--output", str(folder / name), "--workers", str(workers), "--shard-tokens", "3M"]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def saved(folder: Path) -> int:
    """Documents that unfinished work is known to hold; 0 where there is none."""
    try:
        return json.loads((folder / "cut.partial" / "progress.json").read_text())["state"]["progress"]["documents"]
    except FileNotFoundError:
        return 0


@pytest.mark.parametrize(
    "kills", [pytest.param(4, id="4-kills"), pytest.param(40, id="40-kills", marks=pytest.mark.soak)]
)
def test_killed_and_continued_equals_unbroken(tmp_path, kills):
    """The signals fall anywhere, on the whole process group; each time another number of workers goes on."""
    chance = random.Random(kills)
    with open(tmp_path / "texts.jsonl", "w") as file:
        for number in range(4000):
            file.write(json.dumps({"text": f"document {number % 3500} " * chance.randrange(1, 900)}) + "\n")
    whole = start(tmp_path, "whole", 1)
    output, _ = whole.communicate(timeout=300)
    assert whole.returncode == 0, output

    done, documents = 0, []
    while done < kills and not (tmp_path / "cut").exists():
        process = start(tmp_path, "cut", chance.choice([1, 2, 3]))
        sent = chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        begun = process.stdout.readline()
        assert begun.startswith("Reading 1 file"), begun
        # Three kills in four wait for progress; the others fall anywhere, the start of workers included.
        before = saved(tmp_path)
        while done % 4 and process.poll() is None and saved(tmp_path) == before:
            time.sleep(0.002)
        time.sleep(chance.uniform(0.0, 0.3))
        if process.poll() is None:
            os.killpg(process.pid, sent)
        output, _ = process.communicate(timeout=300)
        if process.returncode == 0:
            break  # it ended before the signal
        assert process.returncode in (-signal.SIGKILL, -signal.SIGTERM, 130), output
        if saved(tmp_path):
            documents.append(saved(tmp_path))
            assert process.returncode != 130 or "run the same command again to go on" in output
        done += 1
    assert documents == sorted(documents)
    assert len(set(documents)) >= 2
    if not (tmp_path / "cut").exists():
        last = start(tmp_path, "cut", 2)
        output, _ = last.communicate(timeout=300)
        assert last.returncode == 0, output
    assert content(tmp_path / "cut") == content(tmp_path / "whole")
