"""Writes a run's progress to the experiments database beside showing it."""

import time
from collections.abc import Mapping
from pathlib import Path

from nmoe.cli.eval_report import evaluation_rows, results_folder
from nmoe.eval.results import Results
from nmoe.train.experiments import Experiments
from nmoe.train.protocols import Reporter, RunStart, StepReport

_GAP_S = 5.0


class RecordingReporter:
    """Shows everything through another reporter; every few seconds, and with each checkpoint, the database learns the
    step and its loss, and what each evaluation gave, so that `n runs` follows a run. Tasks' results go into the run's
    folder too."""

    def __init__(self, shown: Reporter, experiments: Experiments) -> None:
        self._shown, self._experiments = shown, experiments
        self._run_id, self._written, self._path = "", 0.0, Path()
        self._results: Results | None = None
        self._last: StepReport | None = None

    def start(self, run: RunStart) -> None:
        """The run begins or resumes."""
        self._run_id, self._path = run.run_id, run.path
        self._shown.start(run)

    def step(self, report: StepReport) -> None:
        """A step was recorded."""
        self._last = report
        if time.monotonic() - self._written >= _GAP_S:
            self._record()
        self._shown.step(report)

    def keep(self, results: Results) -> None:
        """Tasks were measured, of the step that `evaluation` will name."""
        self._results = results

    def evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """An evaluation ended."""
        self._experiments.update(self._run_id, val_loss=values.get("val/loss"), val_bpb=values.get("val/bpb"))
        self._shown.evaluation(step, values)
        results, self._results = self._results, None
        if results is not None:
            self._store(step, results)

    def checkpoint(self, step: int, path: Path) -> None:
        """A checkpoint began to be written."""
        self._record()
        self._shown.checkpoint(step, path)

    def message(self, text: str) -> None:
        """Something a person should read now."""
        self._shown.message(text)

    def close(self) -> None:
        """The run ended, well or not."""
        self._shown.close()

    def _store(self, step: int, results: Results) -> None:
        self._experiments.record_evaluation(evaluation_rows(results, self._run_id, step))
        try:
            results.write(results_folder(self._path, step, ["training"]))
        except OSError as error:  # a full disk, say: the figures are in the database
            self.message(f"step {step}: the results of tasks could not be written: {error}")

    def _record(self) -> None:
        if self._last is not None:
            self._experiments.update(self._run_id, step=self._last.step, train_loss=self._last.loss)
            self._written = time.monotonic()
