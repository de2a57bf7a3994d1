"""Ranks as processes: what is passed on to them, what becomes of the others when one fails, and what is told of it."""

import io
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from nmoe.cli.console import make_console
from nmoe.cli.errors import ExitCode
from nmoe.cli.launch import GRACE_S, run_ranks, threads_a_rank

SCRIPT = Path(__file__).with_name("rank_script.py")
PEER = int(ExitCode.PEER)
NOBODY_WAITED_S = 20.0
"""Far under the minute that a rank stays when nobody ends it, far over what a loaded machine needs."""


class Ranks:
    """Runs the ranks of `rank_script` in this process."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run = folder, folder / "run"
        self.out = io.StringIO()

    def __call__(self, *rules: str, ranks: int = 2):
        command = [sys.executable, str(SCRIPT), str(self.folder), *rules]
        start = time.monotonic()
        ended = run_ranks(ranks, command, dict(os.environ), self.run, make_console(self.out))
        assert time.monotonic() - start < NOBODY_WAITED_S
        assert not [pid for pid in ended.pids if is_alive(pid)]
        return ended

    def signal_when_started(self, number: int, ranks: int = 2) -> None:
        """Sends this process a signal as soon as all ranks are on their way."""

        def send() -> None:
            wait_for(lambda: len(started(self.folder)) == ranks)
            os.kill(os.getpid(), number)

        threading.Thread(target=send).start()

    def log(self, rank: int) -> str:
        return (self.run / "logs" / f"rank_{rank}.log").read_text()


@pytest.fixture
def ranks(tmp_path):
    return Ranks(tmp_path)


@pytest.fixture
def begun(ranks):
    """A run that has its folder."""
    ranks.run.mkdir()
    (ranks.run / "config.toml").write_text("")
    return ranks


def started(folder):
    file = folder / "started"
    return [tuple(map(int, line.split(":"))) for line in file.read_text().splitlines()] if file.exists() else []


def is_alive(pid):
    if not Path("/proc/self").exists():
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        return True
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait_for(condition, seconds=NOBODY_WAITED_S):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_rank_0_is_shown_and_every_rank_has_a_log(begun):
    for _ in range(2):
        ended = begun("0:say=one ä", "1:say=two", "0:error=careful", "1:error=beware", "*:exit=0")
        assert (ended.code, ended.failure) == (0, None)
    assert begun.out.getvalue() == "one ä\none ä\n"
    for rank, said in ((0, ["careful", "one ä"]), (1, ["beware", "two"])):
        head, *runs = begun.log(rank).split(f"== rank {rank} of 2, process ")
        assert head == ""
        assert len(runs) == 2, "a log goes on after what it holds"
        assert all(sorted(text.splitlines()[1:]) == said for text in runs)


def test_what_was_said_before_the_run_had_a_folder_is_in_its_logs(ranks):
    def make_folder():
        wait_for(lambda: len(started(ranks.folder)) == 2)
        ranks.run.mkdir()
        (ranks.run / "config.toml").write_text("")

    threading.Thread(target=make_folder).start()
    ended = ranks("*:error=early", "*:sleep=1.5", "*:error=late", "*:exit=0")
    assert ended.code == 0
    for rank in range(2):
        assert ranks.log(rank).splitlines()[1:] == ["early", "late"]


def test_the_rank_that_fails_by_itself_is_told_and_not_one_that_falls_because_of_it(begun):
    ended = begun("0:error=error: another is gone", f"0:exit={PEER}", "1:peers=3", "1:sleep=0.5", "1:raise", ranks=3)
    assert ended.failure is not None
    assert (ended.failure.rank, ended.failure.code, ended.code) == (1, 1, 1)
    assert ended.failure.how == "ended with exit code 1"
    assert ended.failure.errors.startswith("Traceback")
    assert "RuntimeError: on purpose" in ended.failure.errors
    assert "another is gone" in begun.log(0)
    assert ended.others == {}, "there are logs to read"


def test_ranks_that_only_miss_another_are_told_too(begun):
    ended = begun("1:error=error: rank 0 did not come", f"1:exit={PEER}")
    assert ended.failure is not None
    assert (ended.failure.rank, ended.code) == (1, PEER)
    assert ended.failure.how == f"ended with exit code {PEER} while rank 0 still ran"


def test_without_a_log_the_others_words_are_kept(ranks):
    ended = ranks("0:error=stuck", "1:peers=2", "1:sleep=0.3", "1:exit=3")
    assert ended.failure is not None
    assert (ended.failure.rank, ended.code) == (1, 3)
    assert ended.others == {0: "stuck\n"}
    assert not ranks.run.exists()


@pytest.mark.parametrize(("name", "code"), [("SIGKILL", 137), ("SIGSEGV", 139), ("SIGTERM", 143)])
def test_a_signal_that_killed_a_rank_is_told_by_name(begun, name, code):
    ended = begun(f"1:kill={name}")
    assert ended.failure is not None
    assert (ended.failure.rank, ended.failure.code, ended.code) == (1, code, code)
    assert ended.failure.how.startswith(f"was killed by {name}")
    assert ("Segmentation fault" in ended.failure.errors) == (name == "SIGSEGV"), "where it happened"


def test_a_rank_that_does_not_listen_is_killed_after_the_grace(begun):
    start = time.monotonic()
    ended = begun("0:deaf", "1:peers=2", "1:exit=4")
    assert ended.code == 4
    assert time.monotonic() - start >= GRACE_S


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_reach_every_rank_which_may_take_its_time(begun, number):
    before = signal.getsignal(number)
    begun.signal_when_started(number)
    ended = begun("*:orderly")
    assert (ended.code, ended.failure, ended.is_cut_off) == (128 + number, None, False)
    assert signal.getsignal(number) is before


def test_a_rank_that_a_signal_cuts_off_is_no_failure_and_nobody_waits_for_it(begun):
    begun.signal_when_started(signal.SIGTERM)
    ended = begun("0:deaf")
    assert (ended.code, ended.failure, ended.is_cut_off) == (143, None, True)


def test_a_reader_that_goes_away_ends_nothing(begun):
    read, write = os.pipe()
    os.close(read)
    console = make_console(os.fdopen(write, "w"))
    command = [sys.executable, str(SCRIPT), str(begun.folder), "*:say=a", "*:sleep=0.3", "*:say=b", "*:exit=0"]
    with pytest.raises(BrokenPipeError):
        run_ranks(2, command, dict(os.environ), begun.run, console)
    assert begun.log(0).splitlines()[1:] == ["a", "b"]


def test_no_rank_outlives_a_launcher_that_is_killed(tmp_path):
    code = (
        "import sys; from pathlib import Path; from rich.console import Console; from nmoe.cli.launch import run_ranks;"
        f"run_ranks(2, [sys.executable, {str(SCRIPT)!r}, {str(tmp_path)!r}], {{}}, Path({str(tmp_path)!r}), Console())"
    )
    launcher = subprocess.Popen([sys.executable, "-c", code])
    wait_for(lambda: len(started(tmp_path)) == 2)
    assert all(is_alive(pid) for _, pid in started(tmp_path))
    launcher.kill()
    launcher.wait()
    wait_for(lambda: not any(is_alive(pid) for _, pid in started(tmp_path)))


def test_cores_are_shared_and_no_rank_has_none():
    cores = threads_a_rank(1)
    assert threads_a_rank(cores) == 1
    assert threads_a_rank(cores * 3) == 1
