"""Text for a person, in a terminal and in a log."""

import io

import pytest
from nmoe.cli.console import make_console, print_line, print_summary, print_table
from rich.console import Console

LONG = "n train configs/nano.toml --set data.path=/a/rather/long/path/to/some/data --set train.steps=1000"


def log():
    return make_console(io.StringIO())


def terminal(width=60):
    return Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)


def test_a_log_gets_long_lines_whole_and_text_as_it_is():
    console = log()
    print_line(console, "x" * 500 + " [bold]no markup[/bold] :smile:")
    assert console.file.getvalue() == "x" * 500 + " [bold]no markup[/bold] :smile:\n"


def test_a_logs_table_is_aligned_and_unbroken():
    console = log()
    print_table(console, ("a", "long header", "c"), [("1", "2", "y" * 200), ("longer", "", "")])
    assert console.file.getvalue().splitlines() == [
        "a       long header  c",
        "1       2            " + "y" * 200,
        "longer",
    ]


def test_a_terminals_table_keeps_to_its_width_and_loses_nothing():
    console = terminal()
    print_table(console, ("run", "message"), [("name", "word " * 30)])
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 60
    assert sum(line.count("word") for line in lines) == 30


@pytest.mark.parametrize("console", [log(), terminal()], ids=["log", "terminal"])
def test_a_summarys_command_can_be_copied(console):
    print_summary(console, "Title", [("where", "data/runs/x"), ("loss", "1.5")], [LONG])
    text = console.file.getvalue()
    assert f"  {LONG}\n" in text
    assert text.index("where") < text.index("loss") < text.index("Next:")


def test_a_summarys_values_stay_in_their_column():
    console = terminal()
    print_summary(console, "Title", [("fingerprint", "0123456789abcdef" * 5)])
    inside = [line.strip("│ ") for line in console.file.getvalue().splitlines() if line.startswith("│")]
    assert "".join(line.removeprefix("fingerprint").strip() for line in inside) == "0123456789abcdef" * 5


@pytest.mark.parametrize("console", [log(), terminal()], ids=["log", "terminal"])
def test_brackets_are_text(console):
    print_table(console, ("where", "what"), [("[model]", "[bold]")])
    print_summary(console, "[title]", [("[label]", "[value]")])
    for text in ("[model]", "[bold]", "[title]", "[label]", "[value]"):
        assert text in console.file.getvalue()
