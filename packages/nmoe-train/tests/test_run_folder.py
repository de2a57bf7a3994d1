"""Run folders: made once, locked by one process, with a record of what produced the run."""

import json
import os
import signal
import subprocess
import sys
import tomllib
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from nmoe.train import run_folder
from nmoe.train.environment import environment, git_commit
from nmoe.train.errors import InvalidRunIdError, RunExistsError, RunLockedError, UnknownRunError
from nmoe.train.run_folder import RunFolder, new_run_id


@pytest.fixture(scope="module")
def children():
    command = [sys.executable, Path(__file__).with_name("children.py"), "nmoe.train.run_folder"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield process
        process.stdin.close()


def begin(children, line: str) -> int:
    children.stdin.write(line.encode() + b"\n")
    children.stdin.flush()
    begun, pid = children.stdout.readline().split()
    assert begun == b"begun"
    return int(pid)


def test_everything_is_under_the_run(tmp_path):
    run = RunFolder(tmp_path, "r1")
    assert run.path == tmp_path / "runs" / "r1"
    assert [path.relative_to(run.path).as_posix() for path in (run.config, run.env, run.metrics, run.checkpoints)] == [
        "config.toml",
        "env.json",
        "metrics",
        "checkpoints",
    ]
    assert list(tmp_path.iterdir()) == []


def test_new_names_are_valid_distinct_and_sorted_by_time(tmp_path, monkeypatch):
    now = datetime(2031, 9, 30, 23, 59, 58, tzinfo=UTC)

    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            assert tz is UTC
            return now

    monkeypatch.setattr(run_folder, "datetime", Clock)
    names = []
    for _ in range(5):
        names.append({new_run_id() for _ in range(50)})
        now += timedelta(seconds=1)
    assert [len(group) for group in names] == [50] * 5
    for group in names:
        for name in group:
            RunFolder(tmp_path, name)
    assert sorted(name for group in names for name in group) == [name for group in names for name in sorted(group)]


@pytest.mark.parametrize("run_id", ["", ".", "..", "../x", "a/b", ".hidden", "-option", "a b", "a\n", "é"])
def test_names_that_are_no_folder_names_are_refused(tmp_path, run_id):
    with pytest.raises(InvalidRunIdError):
        RunFolder(tmp_path, run_id)


def test_create_writes_config_and_environment(tmp_path):
    run = RunFolder(tmp_path / "new", "r1")
    run.create('[a]\nb = "é"\n', {"command": ["n", "é"]})
    run.open()
    assert tomllib.loads(run.config.read_text(encoding="utf-8")) == {"a": {"b": "é"}}
    assert json.loads(run.env.read_bytes()) == {"command": ["n", "é"]}
    assert sorted(path.name for path in run.path.iterdir()) == ["config.toml", "env.json"]
    assert [path.name for path in run.path.parent.iterdir()] == ["r1"]


def test_an_existing_run_is_not_created_again(tmp_path):
    RunFolder(tmp_path, "r1").create("a = 1\n", {})
    with pytest.raises(RunExistsError, match="r1"):
        RunFolder(tmp_path, "r1").create("a = 2\n", {})
    assert RunFolder(tmp_path, "r1").config.read_text() == "a = 1\n"
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["r1"]


def test_of_many_processes_that_create_one_run_one_does(tmp_path, children):
    for attempt in range(5):
        begin(children, f"create_run {tmp_path / str(attempt)} 6")
        created = [int(line.split()[1]) for line in iter(children.stdout.readline, b"ended\n")]
        assert len(created) == 1
        run = RunFolder(tmp_path / str(attempt), "run")
        assert run.config.read_text() == f"index = {created[0]}\n"
        assert json.loads(run.env.read_bytes()) == {"index": created[0]}
        assert [path.name for path in run.path.parent.iterdir()] == ["run"]


def test_a_run_whose_making_was_killed_is_not_there(tmp_path, monkeypatch):
    def kill(*args):
        raise KeyboardInterrupt

    run = RunFolder(tmp_path, "r1")
    monkeypatch.setattr(Path, "rename", kill)
    with pytest.raises(KeyboardInterrupt):
        run.create("a = 1\n", {})
    monkeypatch.undo()
    with pytest.raises(UnknownRunError):
        run.open()
    run.create("a = 1\n", {})
    run.open()


def test_an_unknown_run_names_the_nearest(tmp_path):
    with pytest.raises(UnknownRunError, match="0 runs"):
        RunFolder(tmp_path, "r1").open()
    for name in ("20310930-nano", "20310930-moonlet"):
        RunFolder(tmp_path, name).create("", {})
    with pytest.raises(UnknownRunError, match="20310930-moonlet"):
        RunFolder(tmp_path, "2031093-moonlet").open()


def test_rewriting_keeps_what_was(tmp_path):
    run = RunFolder(tmp_path, "r1")
    run.create("a = 1\n", {"n": 1})
    run.rewrite("a = 1\n", {"n": 1})
    assert sorted(path.name for path in run.path.iterdir()) == ["config.toml", "env.json"]
    run.rewrite("a = 1\n", {"n": 2})
    run.rewrite("a = 3\n", {"n": 3})
    contents = {path.name: path.read_text() for path in run.path.iterdir()}
    assert contents == {
        "config.toml": "a = 3\n",
        "config.0.toml": "a = 1\n",
        "env.json": '{\n "n": 3\n}',
        "env.0.json": '{\n "n": 1\n}',
        "env.1.json": '{\n "n": 2\n}',
    }


def test_one_process_writes_a_run_until_it_dies(tmp_path, children):
    run = RunFolder(tmp_path, "run7")
    run.create("", {})
    holder = begin(children, f"hold_lock {tmp_path} 7")
    assert children.stdout.readline() == b"did 7\n"
    with pytest.raises(RunLockedError, match=f"process {holder} on .*, since "), run.lock():
        pytest.fail("two writers")
    os.kill(holder, signal.SIGKILL)
    assert children.stdout.readline() == b"ended\n"
    with run.lock():
        with pytest.raises(RunLockedError, match=f"process {os.getpid()} on "), RunFolder(tmp_path, "run7").lock():
            pytest.fail("two writers")
        RunFolder(tmp_path, "run8").create("", {})
        with RunFolder(tmp_path, "run8").lock():
            pass
    with run.lock():
        pass


def test_a_forked_child_does_not_keep_the_lock(tmp_path):
    run = RunFolder(tmp_path, "r1")
    run.create("", {})
    with run.lock():
        # The descriptor is passed on, as a forked helper process would have it.
        descriptors = [int(name) for name in os.listdir("/dev/fd") if _is_lock(int(name), run)]
        helper = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=descriptors)
    assert len(descriptors) == 1
    with run.lock():
        pass
    helper.communicate(b"\n")


def _is_lock(descriptor: int, run: RunFolder) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(run.path / "lock"))
    except OSError:
        return False


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=n", "-c", "user.email=n@example.org"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


def test_environment_describes_machine_packages_and_command():
    found = environment()
    assert json.loads(json.dumps(found)) == found
    assert found["packages"]["nmoe-train"]
    assert found["packages"]["torch"]
    assert found["python"]["version"] == ".".join(map(str, sys.version_info[:3]))
    assert found["command"] == sys.orig_argv
    assert found["threads"]["intra_op"] >= 1


def test_environment_holds_commit_and_uncommitted_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    assert environment()["git"] is None
    assert git_commit() is None
    git(tmp_path, "init", "-q")
    assert environment()["git"] is None
    (tmp_path / "a.txt").write_text("before\n")
    (tmp_path / ".gitignore").write_text("ignored.txt\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    clean = environment()["git"]
    assert len(clean["commit"]) == 40
    assert clean["commit"] == git_commit()
    assert (clean["diff"], clean["diff_is_cut"], clean["untracked"]) == ("", False, [])
    (tmp_path / "a.txt").write_text("after é\n")
    (tmp_path / "new.txt").write_text("")
    (tmp_path / "ignored.txt").write_text("")
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path / "b")
    changed = environment()["git"]
    assert changed["commit"] == clean["commit"]
    assert "-before\n+after é" in changed["diff"]
    assert changed["untracked"] == ["new.txt"]


def test_environment_asks_the_driver_for_gpus(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    row = "{}, GPU-{}, 143771 MiB, 9.0, 570.1"
    tool.write_text(f"#!/bin/sh\necho '{row.format('NVIDIA H200', 1)}'\necho '{row.format('NVIDIA B200', 2)}'\n")
    tool.chmod(0o755)
    gpus = environment()["gpus"]
    assert [gpu["name"] for gpu in gpus] == ["NVIDIA H200", "NVIDIA B200"]
    assert gpus[0]["driver_version"] == "570.1"
    assert gpus[1]["compute_cap"] == "9.0"
    tool.write_text("#!/bin/sh\necho 'has failed because it could not communicate with the driver'\nexit 9\n")
    assert environment()["gpus"] == []


def test_what_needs_no_torch_does_not_import_it():
    """Listing runs and reading metrics must not cost the seconds that torch takes to import."""
    script = (
        "import sys, nmoe.train.run_folder, nmoe.train.experiments, nmoe.train.metrics; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
