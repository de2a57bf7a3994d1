"""Each mistake that a user makes is named with its place, what was found, and what to write instead."""

from pathlib import Path

import pytest
from nmoe.cli.config import load_config
from nmoe.cli.errors import ConfigError, ExitCode


def problems(path, *sets, **environ):
    with pytest.raises(ConfigError) as caught:
        load_config(path, sets, environ=environ)
    assert caught.value.exit_code is ExitCode.USAGE
    for problem in caught.value.problems:
        assert str(problem) in str(caught.value)
    return [str(problem) for problem in caught.value.problems]


def line_of(path: Path, text: str) -> int:
    lines = path.read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if line.startswith(text))


@pytest.mark.parametrize(
    ("change", "line", "message"),
    [
        (("n_heads = 2", "n_head = 2"), "n_head", "model.n_head: unknown key; did you mean model.n_heads?"),
        (("[optim]", "[optm]"), "[optm]", "optm: unknown section [optm]; did you mean [optim]?"),
        (
            ("steps = 10", 'steps = "10"'),
            "steps",
            'train.steps: expected an integer greater than 0, found "10" (a string)',
        ),
        (("steps = 10", "steps = 10.0"), "steps", "train.steps: expected an integer greater than 0, found 10.0"),
        (("steps = 10", "steps = true"), "steps", "train.steps: expected an integer greater than 0, found true"),
        (("steps = 10", "steps = 0"), "steps", "train.steps: expected an integer greater than 0, found 0"),
        (("steps = 10", "steps = [10]"), "steps", "train.steps: expected an integer greater than 0, found [10]"),
        (("steps = 10", "steps = {a = 1}"), "steps", "train.steps: expected an integer greater than 0, found a table"),
        (
            ("lr_dense = 1e-3", "lr_dense = -1"),
            "lr_dense",
            "optim.lr_dense: expected a number greater than 0, found -1",
        ),
        (("lr_dense = 1e-3", "lr_dense = nan"), "lr_dense", "optim.lr_dense: expected a finite number, found nan"),
        (
            ("lr_dense = 1e-3", "lr_dense = 1e-3\nbeta1 = 1"),
            "beta1",
            "optim.beta1: expected a number at least 0 and less than 1, found 1",
        ),
        (('device = "cpu"', 'device = "gpu"'), "device", 'runtime.device: expected "cpu" or "cuda", found "gpu"'),
        (
            ("steps = 10", "steps = 10\ntarget_loss = 2026-01-31"),
            "target_loss",
            "train.target_loss: expected a number greater than 0, found the date or time 2026-01-31",
        ),
        (
            ("steps = 10", "steps = 10\nevery = 5"),
            "every",
            "train.every: unknown key; did you mean checkpoint.every, metrics.every or eval.every?",
        ),
        (
            ("lr_dense = 1e-3", "lr_dense = 1e-3\nlr = 1e-3"),
            "lr ",
            "optim.lr: unknown key; did you mean optim.lr_dense, optim.lr_router, optim.lr_expert or optim.lr_embed?",
        ),
        (
            ('tokenizer = "byte"', 'tokenizer = "byte"\nqwertz = 1'),
            "qwertz",
            "data.qwertz: unknown key: the keys of [data] are tokenizer, path, mixture, flow, flow_profiles, stage, "
            "document_masking, loss_mask_eos, val_path and corpus",
        ),
        (("steps = 10\n", ""), "[train]", "train.steps: this key is missing; it takes an integer greater than 0"),
    ],
)
def test_one_mistake_in_a_file(config_file, change, line, message):
    path = config_file(change)
    assert problems(path) == [f"{path}:{line_of(path, line)}: {message}"]


def test_a_key_before_any_section(config_file):
    path = config_file(("[model]", "steps = 3\n[model]"))
    assert problems(path) == [f"{path}:1: steps: a key outside any section; did you mean train.steps?"]


def test_missing_sections_say_what_they_need(config_file):
    path = config_file(text="[model]\nvocab_size = 1\n")
    found = problems(path)
    assert f"{path}: train: this section is missing; it needs steps, batch_size, micro_batch_size and seq_len" in found
    assert f"{path}:1: model.dim: this key is missing; it takes an integer greater than 0" in found


def test_all_mistakes_come_at_once_in_the_order_of_the_file(config_file):
    path = config_file(
        ("n_heads = 2", "n_head = 2"),
        ("[optim]", "[optimizer]"),
        ("lr_dense = 1e-3", "lr_dense = 0"),
        ("steps = 10", 'steps = "10"'),
        ("n_activated_experts = 2", "n_activated_experts = 20"),
    )
    found = problems(path)
    # The wrong value under the misspelt section, and the disagreement beside the misspelt key, are found too.
    assert [problem.removeprefix(f"{path}:").split(": ")[1] for problem in found] == [
        "[model]",
        "model.n_head",
        "train.steps",
        "optimizer",
        "optimizer.lr_dense",
    ]


def test_keys_that_disagree_name_their_section_and_where_each_was_written(config_file):
    path = config_file(("n_routed_experts = 4", "n_routed_experts = 5"))
    (problem,) = problems(path, "model.n_expert_groups=2", "model.n_limited_groups=2")
    assert problem.startswith(f"{path}:1: [model]: n_routed_experts = 5 is no multiple of n_expert_groups = 2")
    assert f"n_routed_experts at {path}:{line_of(path, 'n_routed_experts')}" in problem
    assert "n_expert_groups at --set model.n_expert_groups=2" in problem


def test_sections_that_disagree(config_file):
    path = config_file()
    (problem,) = problems(path, "train.batch_size=9")
    assert problem.startswith(f"{path}: train.batch_size = 9 is no multiple of train.micro_batch_size")
    assert "train.batch_size at --set train.batch_size=9" in problem
    assert f"train.micro_batch_size at {path}:{line_of(path, 'micro_batch_size')}" in problem


def test_several_disagreements_are_several_problems(config_file):
    found = problems(config_file(), "train.batch_size=9", "model.mtp_depth=16")
    assert len(found) == 2


def test_a_mistake_in_a_base_names_the_bases_file_and_line(config_file):
    base = config_file(("lr_dense = 1e-3", "lr_dense = -1"))
    top = config_file(text='base = "small.toml"\n[train]\nstep = 3\n', name="top.toml")
    assert problems(top) == [
        f"{base}:{line_of(base, 'lr_dense')}: optim.lr_dense: expected a number greater than 0, found -1",
        f"{top}:3: train.step: unknown key; did you mean train.steps?",
    ]


def test_a_section_spread_over_files_is_located_in_the_file_that_the_user_named(config_file):
    config_file(("steps = 10\n", ""))
    top = config_file(text='base = "small.toml"\n\n[train]\nseq_len = 8\n', name="top.toml")
    assert problems(top) == [f"{top}:3: train.steps: this key is missing; it takes an integer greater than 0"]


@pytest.mark.parametrize(
    ("text", "place", "words"),
    [
        ("[model]\ndim = foo\n", "2:7", "text needs quotes"),
        ("[model]\ndim = 3\ndim = 4\n", "3:8", "a key or section can be written once"),
        ("[model]\n\n[model]\n", "3:7", "a key or section can be written once"),
        ("[model\n", "1:7", "Expected ']'"),
        ("[model]\ndim\n", "2:4", "Expected '='"),
        ("[model]\ndim = [1,\n", "2:10", "Invalid value"),
        ('[model]\ndim = "open\n', "2:12", "Illegal character"),
    ],
)
def test_broken_toml_is_placed_to_the_column(config_file, text, place, words):
    path = config_file(text=text)
    (problem,) = problems(path)
    assert problem.startswith(f"{path}:{place}: no valid TOML: ")
    assert words in problem


def test_a_broken_base_is_named(config_file):
    base = config_file(text="[model\n")
    (problem,) = problems(config_file(text='base = "small.toml"\n', name="top.toml"))
    assert problem.startswith(f"{base}:1:7: no valid TOML")


def test_a_file_that_is_no_text(config_file, tmp_path):
    path = tmp_path / "bytes.toml"
    path.write_bytes(b"[model]\ndim = '\xff'\n")
    assert problems(path) == [f"{path}:2: expected UTF-8, found the byte 0xff: save the file as UTF-8"]


def test_a_missing_file_suggests_its_neighbour(config_file, tmp_path):
    path = config_file()
    asked = tmp_path / "smal.toml"
    assert problems(asked) == [f"expected a TOML file, found nothing at {asked}; did you mean {path}?"]
    assert "nor the folder" in problems(tmp_path / "no" / "small.toml")[0]
    assert problems(tmp_path) == [f"cannot read {tmp_path}: Is a directory"]


def test_a_missing_base_names_the_line_that_asks_for_it(config_file, tmp_path):
    base = config_file()
    top = config_file(text='# comment\nbase = "smal.toml"\n', name="top.toml")
    expected = f"{top}:2: base: expected a TOML file, found nothing at {tmp_path / 'smal.toml'}; did you mean {base}?"
    assert problems(top) == [expected]


def test_bases_in_a_circle(config_file, tmp_path):
    first = config_file(text='base = "b.toml"\n', name="a.toml")
    second = config_file(text='\nbase = "./a.toml"\n', name="b.toml")
    (problem,) = problems(first)
    assert problem.startswith(f"{second}:2: base: ")
    assert f"{first} → {second} → {first}" in problem


def test_a_file_that_inherits_itself_under_another_name(config_file, tmp_path, monkeypatch):
    config_file(text='base = "alias.toml"\n', name="a.toml")
    (tmp_path / "alias.toml").symlink_to("a.toml")
    monkeypatch.chdir(tmp_path)
    (problem,) = problems(Path("a.toml"))
    assert "a.toml → alias.toml" in problem


@pytest.mark.parametrize("value", ["3", '""', '["a"]'])
def test_a_base_that_is_no_path(config_file, value):
    path = config_file(text=f"base = {value}\n")
    assert problems(path)[0].startswith(f"{path}:1: base: expected the path of a TOML file, found ")


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("train.step=5", "train.step: unknown key; did you mean train.steps?"),
        ("tran.steps=5", "tran: unknown section [tran]; did you mean [train]?"),
        ("steps=5", "steps: a key outside any section; did you mean train.steps?"),
        ("yarn.factor=2", "yarn: unknown section [yarn]; did you mean [model.yarn]?"),
        ("model.window=5", "model.window: unknown key; did you mean model.attn_local_window?"),
        ("train.steps=ten", 'train.steps: expected an integer greater than 0, found "ten" (a string)'),
        ("train=5", "train: expected a table, found 5"),
        ("train.steps.x=5", "train.steps: expected an integer greater than 0, found a table"),
        (
            "eval.tasks=[validation]",
            "eval.tasks: expected a TOML value, found [validation]: a bracket or quote is open",
        ),
        ("eval.tasks=[1]", "eval.tasks[0]: expected a string, found 1"),
        ("train.steps", "expected --set section.key=value, such as --set train.steps=100"),
        ("train.=5", "expected --set section.key=value, such as --set train.steps=100"),
        ("train.steps=", 'train.steps: no value after "=": for an empty string write \'""\''),
        ("base=x.toml", 'base: a base belongs in a configuration file, at its top: base = "other.toml"'),
    ],
)
def test_a_mistake_in_set_names_the_flag(config_file, flag, message):
    assert f"--set {flag}: {message}" in problems(config_file(), flag)


def test_an_unknown_task_is_named_with_its_place_and_the_nearest_one(config_file):
    path = config_file(("[runtime]", '[eval]\ntasks = ["validation", "cor"]\n\n[runtime]'))
    (problem,) = problems(path)
    line = path.read_text().splitlines().index('tasks = ["validation", "cor"]') + 1
    assert problem.startswith(f"{path}:{line}: eval.tasks: expected one of core, ")
    assert problem.endswith("found 'cor': did you mean 'core'?")


def test_mistakes_in_flags_and_files_come_together(config_file):
    path = config_file(("n_heads = 2", "n_head = 2"))
    found = problems(path, "nonsense", "train.step=1")
    assert [problem.split(": ")[0] for problem in found] == [
        f"{path}:{line_of(path, 'n_head')}",
        "--set train.step=1",
        "--set nonsense",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("${HOME}/x", "${HOME} names a foreign variable: only names that begin with NMOE_ are expanded"),
        ("${NMOE_X}", "${NMOE_X}: NMOE_X is not set: set it, or give a default as ${NMOE_X:-default}"),
        ("${NMOE_X-1}", "${NMOE_X-1} is no placeholder: expected ${NMOE_NAME} or ${NMOE_NAME:-default}"),
        ("${}", "${} is no placeholder: expected ${NMOE_NAME} or ${NMOE_NAME:-default}"),
        ("${NMOE_X", "expected closed placeholders that are not nested, found '${NMOE_X'"),
        ("${NMOE_NESTED}", "expected closed placeholders that are not nested, found '${NMOE_Y}'"),
    ],
)
def test_placeholders_that_cannot_be_expanded(config_file, text, message):
    path = config_file(('corpus = "pydoc"', f'path = "{text}"'))
    found = problems(path, NMOE_NESTED="${NMOE_Y}", HOME="/root")
    assert found == [f"{path}:{line_of(path, 'path')}: data.path: {message}"]
