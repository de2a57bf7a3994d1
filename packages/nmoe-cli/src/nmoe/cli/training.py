"""Composes a training run: data, run folder, database, trainer, evaluation, and the words at its end."""

import shlex
import sqlite3
from dataclasses import dataclass
from pathlib import Path

from nmoe.cli.config import LoadedConfig, RunConfig, load_config
from nmoe.cli.console import is_live, print_line, print_summary
from nmoe.cli.context import Context
from nmoe.cli.errors import ExitCode, UsageError
from nmoe.cli.exit_codes import exit_code_of
from nmoe.cli.fingerprint import diff, fingerprint, identity_fields, operational_fields
from nmoe.cli.locate import locate_model
from nmoe.cli.loss_curve import loss_curve
from nmoe.cli.recording import RecordingReporter
from nmoe.cli.reporter import make_reporter
from nmoe.cli.run_data import RunData, open_run_data, validation_set
from nmoe.cli.tokenizer_name import check_same_tokenizer, tokenizer_document
from nmoe.cli.toml_writer import dump_toml
from nmoe.data.loader import Loader
from nmoe.eval.validation import validate
from nmoe.model.checkpoint import TensorFolder
from nmoe.model.errors import WeightsMismatchError
from nmoe.model.generation import Sampling, generate
from nmoe.model.hf_config import export_problems
from nmoe.model.transformer import Transformer
from nmoe.model.weights import config_document, read_config, shape_problems
from nmoe.train.checkpointer import load, newest_complete, step_of
from nmoe.train.environment import environment, git_commit
from nmoe.train.errors import NonFiniteError, UnknownRunError
from nmoe.train.experiments import EndStatus, Experiments, RunRow
from nmoe.train.loop import Outcome, train
from nmoe.train.metrics import read_metrics
from nmoe.train.run_folder import RunFolder, new_run_id
from nmoe.train.state import check_identity

SAMPLE_TOKENS = 200
SAMPLE = Sampling(temperature=0.8, top_p=0.95, seed=0)


@dataclass(frozen=True)
class Request:
    """What the command line asked for."""

    path: Path
    """The configuration file; its name is the experiment's."""
    loaded: LoadedConfig
    run_id: str | None
    resume: bool | None
    start_from: str | None
    profile: str | None


def run_training(request: Request, context: Context) -> int:
    """Trains as requested; returns the exit code. What can be refused is refused before anything is written.

    Raises:
        UsageError: the request contradicts itself or what is on disk.
        Any error of data, checkpoints or trainer; the database then says how the run ended.
    """
    profile = _parse_profile(request.profile)
    run = RunFolder(context.data_root, request.run_id or new_run_id())
    continues = _continues(request, run)
    config, console = request.loaded.config, context.console
    data = open_run_data(config.data, config.model.vocab_size, context.data_root, console)
    if config.train.target_loss is not None and (data.val is None or "validation" not in config.eval.tasks):
        raise UsageError("train.target_loss is of the validation loss, and nothing is validated: set data.val_path")
    loader = Loader(data.train, config.train.seq_len, config.runtime.seed)
    parent = _open_parent(request.start_from, config, data, context) if request.start_from else None
    resolved, env = dump_toml(request.loaded.resolved), environment()
    env["threads"]["intra_op"] = config.runtime.threads or env["threads"]["intra_op"]
    if not continues:
        run.create(resolved, env)
    with run.lock(), Experiments(context.data_root / "experiments.db") as experiments:
        checkpoint = _newest(run) if continues else None
        composition = _Composition(request, context, run, experiments, data, loader)
        if continues:
            composition.check_continuation(checkpoint)
            if checkpoint is None and (spec := _recorded_parent(experiments, run)) is not None:
                parent = _open_parent(spec, config, data, context)
            run.rewrite(resolved, env)
        experiments.start(
            run.run_id,
            experiment=request.path.stem,
            config=resolved,
            steps=config.train.steps,
            step=0 if checkpoint is None else step_of(checkpoint.path),
            git_commit=git_commit(),
            parent_run=parent.name if parent else None,
            parent_step=parent.step if parent else None,
        )
        try:
            outcome = composition.train(checkpoint, parent.folder if parent else None, profile)
        except BaseException as error:
            _record_failure(experiments, run, error, context)
            if exit_code_of(error) is not ExitCode.BUG:
                print_line(context.error_console, f"The run is in {run.path}; {_resume_hint(request, run, context)}")
            raise
        status: EndStatus = "interrupted" if outcome.status == "interrupted" else "finished"
        experiments.finish(run.run_id, status, outcome.status)
    if outcome.status == "interrupted":
        saved = config.checkpoint.enabled and outcome.step > 0
        kept = f"which is saved; {_resume_hint(request, run, context)}" if saved else "and nothing is saved"
        print_line(console, f"Stopped after step {outcome.step}, {kept}")
        return 128 + (outcome.signal or 0)
    composition.summarise(outcome)
    return ExitCode.OK


@dataclass(frozen=True)
class _Parent:
    """The model that a run starts from."""

    name: str
    """A run's id, or the folder of an imported model."""
    step: int | None
    folder: TensorFolder


def _open_parent(spec: str, config: RunConfig, data: RunData, context: Context) -> _Parent:
    """Opens and checks the parent; differences of the `[model]` section that leave the weights' shape are told."""
    located = locate_model(spec, context.data_root)
    folder = load(located.folder)
    check_same_tokenizer(folder, data.tokenizer)
    problems = shape_problems(folder, config.model)
    if problems:
        raise WeightsMismatchError(folder.path, problems)
    before, now = config_document(read_config(folder)), config_document(config.model)
    for change in diff(before, now):
        print_line(context.console, f"model.{change.key}: {change.old} in {spec}, {change.new} here")
    return _Parent(located.run.run_id if located.run else str(located.folder), located.step, folder)


def _recorded_parent(experiments: Experiments, run: RunFolder) -> str | None:
    """The parent of a run that was stopped before its first checkpoint, as `--from` named it."""
    row = _row(experiments, run)
    if row is None or row.parent_run is None:
        return None
    return row.parent_run if row.parent_step is None else f"{row.parent_run}@{row.parent_step}"


def _row(experiments: Experiments, run: RunFolder) -> RunRow | None:
    try:
        return experiments.get(run.run_id)
    except UnknownRunError:
        return None


def _record_failure(experiments: Experiments, run: RunFolder, error: BaseException, context: Context) -> None:
    try:
        experiments.finish(run.run_id, _status_after(error), str(error) or type(error).__name__)
    except sqlite3.Error as other:  # a full disk, say: the error that ended the run is the one to tell
        print_line(context.error_console, f"The experiments database could not be written: {other}")


class _Composition:
    """The parts of one run, held together while it trains."""

    def __init__(
        self,
        request: Request,
        context: Context,
        run: RunFolder,
        experiments: Experiments,
        data: RunData,
        loader: Loader,
    ) -> None:
        self.request, self.context, self.run, self.experiments = request, context, run, experiments
        self.config, self.data, self.loader = request.loaded.config, data, loader
        self.identity = {**identity_fields(self.config), "data": loader.fingerprint}
        self.sample: str | None = None

    def check_continuation(self, checkpoint: TensorFolder | None) -> None:
        """Refuses to go on with a run that has ended, or under settings that change what it computes; tells the
        operational keys that changed.

        Raises:
            UsageError: the run has ended.
            IdentityMismatchError: keys or data differ; lists each, old and new.
        """
        before, config = load_config(self.run.config, environ=self.context.environ).config, self.config
        row = _row(self.experiments, self.run)
        same_target = before.train.target_loss == config.train.target_loss
        if row is not None and row.status == "finished":
            if row.message == "target_reached" and same_target:
                raise UsageError(f"run {row.run_id} reached its target loss at step {row.step}: leave out --run-id")
            if row.message != "target_reached" and config.train.steps <= row.step:
                raise UsageError(
                    f"run {row.run_id} has its {row.step} steps: add --set train.steps=… to go on, "
                    "or leave out --run-id for a new run"
                )
        if checkpoint is not None:
            check_identity(checkpoint.document("identity"), self.identity)
        for change in diff(operational_fields(before), operational_fields(config)):
            print_line(self.context.console, f"{change.key}: {change.old} before, {change.new} now")

    def train(
        self, checkpoint: TensorFolder | None, start_from: TensorFolder | None, profile: tuple[int, int] | None
    ) -> Outcome:
        """Runs the trainer."""
        labels = {
            **tokenizer_document(self.config.data.tokenizer, self.data.tokenizer),
            "fingerprint": fingerprint(self.config, self.loader.fingerprint),
        }
        measures = self.data.val is not None and "validation" in self.config.eval.tasks
        outcome = train(
            self.config,
            run=self.run,
            batches=self.loader,
            identity=self.identity,
            labels=labels,
            reporter=RecordingReporter(make_reporter(self.context.console), self.experiments),
            evaluate=self._evaluate if measures else None,
            evaluate_every=self.config.eval.every,
            resume=checkpoint,
            start_from=start_from,
            at_end=self._draw_sample,
            profile=profile,
        )
        self.experiments.update(self.run.run_id, step=outcome.step, train_loss=outcome.loss)
        return outcome

    def _evaluate(self, model: Transformer) -> dict[str, float]:
        assert self.data.val is not None, "there is no evaluation without a validation set"
        batches = validation_set(self.data.val, self.config.train.seq_len, self.config.train.micro_batch_size)
        result = validate(model, batches, self.config.eval.max_sequences)
        self.experiments.update(self.run.run_id, val_loss=result.loss, val_bpb=result.bpb)
        return result.tags()

    def _draw_sample(self, model: Transformer) -> None:
        tokenizer = self.data.tokenizer
        prompt = [tokenizer.eos_id]  # the start of a document
        ids = generate(
            model,
            prompt,
            max_tokens=SAMPLE_TOKENS,
            sampling=SAMPLE,
            eos_id=tokenizer.eos_id,
            n_ids=tokenizer.n_vocab,
        )
        self.sample = tokenizer.decode(list(ids))

    def summarise(self, outcome: Outcome) -> None:
        """Prints the curve, a sample, and where everything is."""
        console, run = self.context.console, self.run
        points = _points(run)
        width = min(console.width, 100) if is_live(console) else 80
        curve = loss_curve(
            points["train/loss"], points["val/loss"], width=width, unicode=not console.options.ascii_only
        )
        for line in curve.splitlines():
            print_line(console, line)
        if self.sample is not None:
            print_line(console, "")
            print_line(console, f"Sample (temperature {SAMPLE.temperature}, top-p {SAMPLE.top_p}):")
            print_line(console, self.sample)
            print_line(console, "")
        saved = newest_complete(run.checkpoints)
        rows = [
            ("run", str(run.path)),
            ("checkpoint", "none, as checkpoint.enabled = false" if saved is None else str(saved)),
        ]
        if outcome.loss is not None:
            rows.append(("training loss", f"{outcome.loss:.4f} nats a token at step {outcome.step}"))
        limit = self.config.eval.max_sequences
        scored = "every validation byte scored once" if limit is None else f"over the first {limit} sequences"
        for tag, unit in (("val/loss", "nats a token"), ("val/bpb", f"bits a byte, {scored}")):
            if tag in outcome.evaluation:
                rows.append((tag, f"{outcome.evaluation[tag]:.4f} {unit}"))
        gzip = self.data.val.manifest.gzip_bits_per_byte if self.data.val else None
        if gzip is not None:
            rows.append(("gzip -9", f"{gzip:.4f} bits a byte on the whole validation text"))
        steps = self._next_steps(has_model=saved is not None)
        print_summary(console, f"Run {run.run_id}: {outcome.status.replace('_', ' ')}", rows, steps)

    def _next_steps(self, *, has_model: bool) -> list[str]:
        run_id, path, data = self.run.run_id, self.request.path, self.config.data
        n = self.context.command
        steps = [f'{n} generate {run_id} --prompt "The "', f"{n} eval {run_id}"] if has_model else []
        if has_model and not export_problems(self.config.model):
            steps.append(f"{n} export {run_id} --output exported")
        prep = f"{n} data prep FILES --tokenizer {data.tokenizer} --output data/mine"
        return [*steps, f"{prep} && {n} train {path} --set data.path=data/mine"]


def _points(run: RunFolder) -> dict[str, list[tuple[int, float]]]:
    points: dict[str, list[tuple[int, float]]] = {"train/loss": [], "val/loss": []}
    for row in read_metrics(run.metrics, tags=list(points)).to_pylist():
        points[row["tag"]].append((row["step"], row["value"]))
    return points


def _continues(request: Request, run: RunFolder) -> bool:
    exists = run.config.is_file()
    if request.resume is True and not exists:
        run.open()  # says which runs there are
    if request.resume is False and exists:
        raise UsageError(
            f"run {run.run_id} exists, in {run.path}: leave out --no-resume to continue it, or give another --run-id"
        )
    if exists and request.start_from is not None:
        raise UsageError(f"--from starts a new run, and {run.run_id} exists: give another --run-id, or none")
    return exists


def _newest(run: RunFolder) -> TensorFolder | None:
    path = newest_complete(run.checkpoints)
    return None if path is None else load(path)


def _status_after(error: BaseException) -> EndStatus:
    if isinstance(error, NonFiniteError):
        return "diverged"
    return "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"


def _parse_profile(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise UsageError(f"expected --profile START:STOP with 1 ≤ START ≤ STOP, found {text!r}")
    return int(first), int(last)


def _resume_hint(request: Request, run: RunFolder, context: Context) -> str:
    sets = [part for value in request.loaded.sets for part in ("--set", value)]
    arguments = shlex.join(["train", str(request.path), *sets, "--run-id", run.run_id])
    return f"continue it with:\n  {context.command} {arguments}"
