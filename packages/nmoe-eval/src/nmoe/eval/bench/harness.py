"""lm-evaluation-harness on an exported model, as the benches call it. It, transformers and accelerate must be there."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from nmoe.eval.bench.documents import DATASETS
from nmoe.eval.bench.setup import Setup
from nmoe.eval.choice_tasks import choice_specs

_SHOTS_SEED = 1234
"""As the harness's `simple_evaluate` sets it."""


@dataclass(frozen=True)
class Answered:
    """What the harness made of a task."""

    scores: list[list[float]]
    """A document, a choice: log-likelihoods."""
    accuracy: float
    score_s: float
    """From tokens to log-likelihoods on the host."""
    whole_s: float
    """With the prompts' encoding."""


class Harness:
    """The harness's own Hugging Face model, with an exported model in it.

    Args:
        setup: the device and the dtype.
        model: folder of the exported model.
        data: where `write_documents` wrote.
        max_length: tokens that the model sees.
    """

    def __init__(self, setup: Setup, model: Path, data: Path, max_length: int) -> None:
        transformers, hugging = import_module("transformers"), import_module("lm_eval.models.huggingface")
        # Experts are computed by grouped products, which transformers does by itself wherever torch has them.
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            model, dtype=setup.dtype, device_map={"": setup.device}, attn_implementation="sdpa"
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        self.attention = str(theirs.config._attn_implementation)
        self.experts = str(theirs.config._experts_implementation)
        self._lm = hugging.HFLM(pretrained=theirs, tokenizer=tokenizer, max_length=max_length)
        self._templates = import_module("lm_eval.tasks").TaskManager()
        self._setup, self._data = setup, data
        self._tasks: dict[str, Any] = {}
        self._seconds: dict[str, float] = {}
        for name in ("loglikelihood", "_loglikelihood_tokens"):
            setattr(self._lm, name, self._clocked(name, getattr(self._lm, name)))

    def run(self, name: str, batch: int, softmax: torch.dtype | None = None) -> Answered:
        """One task, all of it.

        Args:
            name: of the task, with `:SHOTS` behind it if there are any.
            batch: sequences at once.
            softmax: what the harness computes log-probabilities in; None: what it has by default, the model's dtype.

        Raises:
            torch.OutOfMemoryError: so many do not fit.
        """
        task = self._task(name)
        self._lm.batch_size_per_gpu, self._lm.softmax_dtype = batch, softmax
        found = import_module("lm_eval").evaluate(
            self._lm, {"tasks": {task.task_name: task}, "groups": {}, "group_map": {}}, bootstrap_iters=0
        )
        samples = sorted(found["samples"][task.task_name], key=lambda sample: sample["doc_id"])
        return Answered(
            [[float(logprob) for ((logprob, _),) in sample["resps"]] for sample in samples],
            found["results"][task.task_name]["acc,none"],
            self._seconds["_loglikelihood_tokens"],
            self._seconds["loglikelihood"],
        )

    def _task(self, name: str) -> Any:
        """The harness's own template, with nothing replaced but where the data is."""
        if name not in self._tasks:
            label, _, shots = name.partition(":")
            dataset = DATASETS[label]
            place = self._data / dataset.place
            splits = {split: str(place / f"{split}.jsonl") for split in (dataset.split, dataset.shots_split)}
            replaced = {
                "include": str(self._templates.task_index[choice_specs()[label].harness].yaml_path),
                "task": name.replace(":", "_"),
                "dataset_path": "json",
                "dataset_name": None,
                "dataset_kwargs": {"data_files": splits, "cache_dir": str(self._data / "cache")},
            }
            path = self._data / f"{replaced['task']}.yaml"
            path.write_text(json.dumps(replaced), encoding="utf-8")  # every YAML reader reads JSON
            (task,) = self._templates.load([str(path)])["tasks"].values()
            task.set_config(key="num_fewshot", value=int(shots or 0))
            task.set_fewshot_seed(seed=_SHOTS_SEED)
            self._tasks[name] = task
        return self._tasks[name]

    def _clocked(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def clocked(*args: Any, **options: Any) -> Any:
            begun = time.perf_counter()
            found = call(*args, **options)
            if not self._setup.is_toy:
                torch.cuda.synchronize()
            self._seconds[name] = time.perf_counter() - begun
            return found

        return clocked
