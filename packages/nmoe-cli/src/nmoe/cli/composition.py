"""The parts of one rank's run, held together while it trains: trainer, evaluation, sample, and the words at the end."""

from collections.abc import Callable, Sequence
from itertools import takewhile

from nmoe.cli.console import is_live, print_line, print_summary
from nmoe.cli.context import Context
from nmoe.cli.eval_training import measure_suites
from nmoe.cli.fingerprint import fingerprint
from nmoe.cli.loss_curve import loss_curve
from nmoe.cli.run_data import documents_of, validation_set
from nmoe.cli.run_inputs import Inputs, Request
from nmoe.cli.tokenizer_name import tokenizer_document
from nmoe.eval.results import Results
from nmoe.eval.schema import VALIDATION
from nmoe.eval.sources import Suite
from nmoe.eval.validation import validate
from nmoe.model.checkpoint import TensorFolder
from nmoe.model.generation import Sampling, generate
from nmoe.model.hf_config import export_problems
from nmoe.model.transformer import Transformer
from nmoe.rdep.world import World
from nmoe.train.checkpointer import newest_complete
from nmoe.train.loop import Outcome, train
from nmoe.train.metrics import read_metrics
from nmoe.train.protocols import Reporter
from nmoe.train.run_folder import RunFolder

SAMPLE_TOKENS = 200
SAMPLE = Sampling(temperature=0.8, top_p=0.95, seed=0)


class Composition:
    """What one rank computes. Every rank makes the same calls; only the first one's say anything."""

    def __init__(
        self,
        request: Request,
        context: Context,
        inputs: Inputs,
        world: World,
        reporter: Reporter,
        suites: Sequence[Suite] = (),
        keep: Callable[[Results], None] = lambda results: None,
    ) -> None:
        """`suites`: what `eval.tasks` names besides validation; `keep` is given each measurement of them."""
        self.suites, self.keep = suites, keep
        self.request, self.context, self.inputs = request, context, inputs
        self.world, self.reporter = world, reporter
        self.config, self.run, self.data = request.loaded.config, inputs.run, inputs.data
        self.sample: str | None = None

    def train(self, checkpoint: TensorFolder | None, start_from: TensorFolder | None) -> Outcome:
        """Runs the trainer, with evaluations, and a sample at the end."""
        loader = self.inputs.loader
        labels = {
            **tokenizer_document(self.config.data.tokenizer, self.data.tokenizer),
            "fingerprint": fingerprint(self.config, loader.fingerprint),
        }
        measures = self._validates or bool(self.suites)
        return train(
            self.config,
            world=self.world,
            run=self.run,
            batches=loader,
            documents=documents_of(self.config.data, self.data.tokenizer),
            identity=self.inputs.identity(self.config),
            labels=labels,
            reporter=self.reporter,
            evaluate=self._evaluate if measures else None,
            evaluate_every=self.config.eval.every,
            resume=checkpoint,
            start_from=start_from,
            at_end=self._draw_sample,
            profile=self.inputs.profile,
        )

    @property
    def _validates(self) -> bool:
        return self.data.val is not None and VALIDATION in self.config.eval.tasks

    def _evaluate(self, model: Transformer) -> dict[str, float]:
        tags = self._validate(model) if self._validates else {}
        if not self.suites:
            return tags
        results = measure_suites(model, self.data.tokenizer, self.suites, self.config, self.world, self.reporter)
        if results is None:
            return tags
        self.keep(results)
        return tags | results.tags()

    def _validate(self, model: Transformer) -> dict[str, float]:
        assert self.data.val is not None, "there is no validation without a validation set"
        batches = validation_set(
            self.data.val,
            self.config.train.seq_len,
            self.config.train.micro_batch_size,
            document_masking=self.config.data.document_masking,
        )
        return validate(model, batches, self.config.eval.max_sequences, self.world).tags()

    def _draw_sample(self, model: Transformer) -> None:
        tokenizer = self.data.tokenizer
        prompt = [tokenizer.eos_id]  # the start of a document
        # With no end of its own, so that all ranks call the model as often; what follows the text is cut off.
        drawn = list(
            generate(model, prompt, max_tokens=SAMPLE_TOKENS, sampling=SAMPLE, eos_id=None, n_ids=tokenizer.n_vocab)
        )
        self.sample = tokenizer.decode(list(takewhile(lambda token: token != tokenizer.eos_id, drawn)))

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
        gzip = self.data.val.gzip_bits_per_byte if self.data.val else None
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
        if data.path is not None or data.mixture is not None:  # one's own already
            return steps
        prep = f"{n} data prep FILES --tokenizer {data.tokenizer} --output data/mine"
        return [*steps, f"{prep} && {n} train {path} --set data.path=data/mine"]


def _points(run: RunFolder) -> dict[str, list[tuple[int, float]]]:
    points: dict[str, list[tuple[int, float]]] = {"train/loss": [], "val/loss": []}
    for row in read_metrics(run.metrics, tags=list(points)).to_pylist():
        points[row["tag"]].append((row["step"], row["value"]))
    return points
