"""`n` as a process: its speed, its suggestions, its exit codes."""

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cyclopts import App
from nmoe.cli import app as app_module
from nmoe.cli.errors import ExitCode, UsageError
from nmoe.cli.options import ConfigFile, Sets

HEAVY = ("torch", "pydantic", "numpy", "pyarrow", "tiktoken", "plotext", "nmoe.train", "nmoe.model", "nmoe.data")


def python(code: str, **environ: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | environ
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)


def n_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    return python(f"import sys; sys.argv = ['n', *{arguments!r}]; from nmoe.cli.app import main; main()")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["data", "prep", "--help"], ["nonsense"]])
def test_nothing_heavy_is_imported_before_a_command_runs(arguments):
    done = python(
        f"import sys; sys.argv = ['n', *{arguments!r}]\n"
        "import nmoe.cli\nfrom nmoe.cli.app import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        f"loaded = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "print('loaded:', loaded)"
    )
    assert done.stdout.splitlines()[-1] == "loaded: []", done.stderr


def test_the_configuration_imports_no_torch():
    done = python("import sys, nmoe.cli.config, nmoe.cli.dry_run; print('torch' in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr


def test_help_answers_in_half_a_second():
    # The best of three, and of the process's own time where that is less: what n takes, not what else the machine does.
    seconds = []
    for _ in range(3):
        own, start = children_seconds(), time.perf_counter()
        assert n_process("--help").returncode == 0
        seconds += [children_seconds() - own, time.perf_counter() - start]
    assert min(seconds) < 0.5


def children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def test_help_tells_every_exit_code():
    text = n_process("--help").stdout
    told = {int(line.split()[0]) for line in text.splitlines() if line.strip()[:1].isdigit()}
    assert told == {code.value for code in ExitCode}


def test_readme_tells_every_exit_code():
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    told = {int(line.split("|")[1]) for line in readme.splitlines() if line.startswith("| ") and line[2].isdigit()}
    assert told == {code.value for code in ExitCode}


def test_a_bare_n_shows_help(n):
    outcome = n()
    assert outcome.code == ExitCode.OK
    assert "data" in outcome.out


def test_version(n):
    assert n("--version").out.startswith("nmoe 0.")


@pytest.mark.parametrize(
    ("arguments", "suggestion"),
    [
        (["docter"], 'Did you mean "doctor"?'),
        (["dta", "prep"], 'Did you mean "data"?'),
        (["data", "perp"], 'Did you mean "prep"?'),
        (["doctor", "--devise", "cpu"], "Did you mean --device?"),
        (["data", "prep", "a.txt", "--outptu", "x"], "Did you mean --output?"),
        (["doctor", "--device", "cudda"], 'Did you mean "cuda"?'),
    ],
)
def test_a_mistyped_command_or_option_gets_a_suggestion(n, arguments, suggestion):
    outcome = n(*arguments)
    assert outcome.code == ExitCode.USAGE
    assert suggestion in outcome.err
    assert outcome.out == ""


@pytest.mark.parametrize(
    ("arguments", "help_of"),
    [(["data", "prep"], "n data prep --help"), (["doctor", "--device"], "n doctor --help"), (["x"], "n --help")],
)
def test_a_mistake_names_the_help_that_serves(n, arguments, help_of):
    outcome = n(*arguments)
    assert outcome.code == ExitCode.USAGE
    assert outcome.err.endswith(f"See: {help_of}\n")


@pytest.fixture
def n_raising(n, monkeypatch):
    """`n boom`, a command that raises what it is given."""

    def call(error):
        original = app_module.build_app

        def with_boom(context):
            app = original(context)

            def boom():
                raise error

            app.command(boom)
            return app

        monkeypatch.setattr(app_module, "build_app", with_boom)
        return n("boom")

    return call


def test_a_typed_error_is_told_without_a_traceback(n_raising):
    outcome = n_raising(UsageError("no run x [bold]"))
    assert (outcome.code, outcome.err) == (ExitCode.USAGE, "error: no run x [bold]\n")


def test_an_error_without_words_is_told_by_its_name(n_raising):
    assert n_raising(UsageError()).err == "error: UsageError\n"


def test_an_interrupt_ends_with_130(n_raising):
    assert n_raising(KeyboardInterrupt()).code == ExitCode.INTERRUPTED


def test_an_unforeseen_error_keeps_its_traceback(n_raising):
    with pytest.raises(ZeroDivisionError):
        n_raising(ZeroDivisionError("a bug"))


def test_an_unforeseen_error_ends_the_process_with_1():
    done = python(
        "import sys; sys.argv = ['n', 'doctor']\n"
        "import nmoe.cli.doctor\n"
        "def broken(*_): raise ZeroDivisionError('a bug')\n"
        "nmoe.cli.doctor.diagnose = broken\n"
        "from nmoe.cli.app import main; main()"
    )
    assert done.returncode == ExitCode.BUG
    assert "Traceback" in done.stderr


def test_a_reader_that_goes_away_is_no_traceback():
    # The pipe's reading end is closed before n writes.
    code = "import sys; sys.argv = ['n', '--help']; from nmoe.cli.app import main; main()"
    reading, writing = os.pipe()
    process = subprocess.Popen([sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE)
    os.close(reading)
    os.close(writing)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 141
    assert stderr == b""


def test_a_terminal_that_lacks_a_character_is_no_error():
    done = python(
        "import sys; sys.argv = ['n', 'data', 'info', 'größe']; from nmoe.cli.app import main; main()",
        PYTHONIOENCODING="ascii",
    )
    assert done.returncode == ExitCode.DATA
    assert "gr??e" in done.stderr


def test_set_may_be_given_many_times_anywhere():
    app = App(result_action="return_value")

    @app.default
    def train(config: ConfigFile, /, *, sets: Sets = ()):
        return config, sets

    expected = (Path("c.toml"), ("a.b=-1", "c.d=[1, 2]"))
    assert app(["c.toml", "--set", "a.b=-1", "--set", "c.d=[1, 2]"]) == expected
    assert app(["--set", "a.b=-1", "c.toml", "--set=c.d=[1, 2]"]) == expected
