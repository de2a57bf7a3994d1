"""`n runs` against the experiments database."""

import os

import pytest
from nmoe.cli.errors import ExitCode
from nmoe.train.experiments import Experiments


@pytest.fixture
def experiments(tmp_path):
    with Experiments(tmp_path / "root" / "experiments.db") as opened:
        yield opened


def start(experiments, run_id, **more):
    experiments.start(run_id, experiment="nano", config="", steps=600, **more)


def test_without_runs_it_names_the_first_command_and_makes_nothing(n, tmp_path):
    outcome = n("runs")
    assert outcome.code == ExitCode.OK
    assert "n train configs/nano.toml" in outcome.out
    assert not (tmp_path / "root").exists()


def test_runs_are_listed_latest_first_with_state_and_losses(n, experiments):
    start(experiments, "first")
    experiments.update("first", step=600, train_loss=1.25, val_loss=1.5, val_bpb=2.164)
    experiments.finish("first", "finished")
    start(experiments, "second", parent_run="first", parent_step=400)
    experiments.finish("second", "diverged", "step 7: loss is NaN\nmore")
    start(experiments, "third")
    outcome = n("runs")
    lines = [line.split() for line in outcome.out.splitlines()]
    assert [line[0] for line in lines] == ["run", "third", "second", "first"]
    assert lines[1][1:3] == ["running", "0/600"]
    assert lines[3][1:6] == ["finished", "600/600", "1.2500", "1.5000", "2.1640"]
    assert "first@400" in lines[2]
    assert outcome.out.splitlines()[2].endswith("step 7: loss is NaN")


def test_a_run_whose_process_died_reads_as_killed(n, experiments):
    child = os.fork()
    if child == 0:
        Experiments(experiments.path).start("gone", experiment="nano", config="", steps=600)
        os._exit(0)
    os.waitpid(child, 0)
    assert n("runs").out.splitlines()[1].split()[:2] == ["gone", "killed"]


def test_columns_without_content_are_left_out(n, experiments):
    start(experiments, "only")
    assert n("runs").out.splitlines()[0].split() == ["run", "status", "step", "started", "took"]


def test_the_limit_keeps_the_latest_and_says_how_to_see_more(n, experiments):
    for number in range(4):
        start(experiments, f"r{number}")
    lines = n("runs", "--limit", "2").out.splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["r3", "r2"]
    assert lines[3:] == ["Older runs: n runs --limit 10"]
    assert "Older" not in n("runs", "--limit", "4").out
    assert n("runs", "--limit", "0").code == ExitCode.USAGE
