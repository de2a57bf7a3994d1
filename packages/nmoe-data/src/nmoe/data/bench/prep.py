"""`python -m nmoe.data.bench prep`: prep against bare tiktoken and datatrove's tokenizer step, on the same cores.

The input's documents are written `copies` times as JSONL files into a temporary folder. Each contender is a process of
its own, held to as many cores as it has workers, and what is timed is the work alone, not its imports:

- `tiktoken`: `encode_ordinary_batch` of all texts, in memory already, with a thread a core; keeps the ids as they come;
- `prep`: from files to finished shards, checksums and the start of workers included, into a new folder;
- `datatrove`: its JSONL reader and `DocumentTokenizer` without shuffling, a task a core, from files to its own files.
  Left out (null) where it is not installed.

Rounds take turns (datatrove has one); `seconds` is the best of them, since what else the machine does can only add.
`peak_mib` is the peak resident memory of the main process and of the largest worker; `memory` has it for ten times the
text as well.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from nmoe.data.bench.results import PACKAGES, header, write
from nmoe.data.sources import open_source
from nmoe.data.tokenizers import load_tokenizer, tokenizer_json

_CONTENDERS = ("tiktoken", "prep", "datatrove")


def main(arguments: Sequence[str]) -> int:
    """Measures and writes; gives the exit code."""
    parser = argparse.ArgumentParser(prog="python -m nmoe.data.bench prep", description=__doc__)
    parser.add_argument("--input", required=True, help="text, JSONL or Parquet")
    parser.add_argument("--tokenizer", default="gpt2", help="gpt2, o200k_harmony or both with a comma; %(default)s")
    parser.add_argument("--workers", default="1,2", help="numbers of processes, each on a core; %(default)s")
    parser.add_argument("--copies", type=int, default=4, help="of the input; %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="%(default)s")
    parser.add_argument("--output", type=Path, default=None, help="a JSON file; standard output if left out")
    options = parser.parse_args(arguments)
    counts = [int(count) for count in options.workers.split(",")]
    results = header("prep", arguments, (*PACKAGES, "datatrove", "tokenizers"))
    with TemporaryDirectory() as name:
        work = Path(name)
        texts = list(open_source(None, [options.input]))
        n_bytes = sum(len(text.encode()) for text in texts)
        results |= {"copies": options.copies, "documents": options.copies * len(texts)}
        results |= {"text_bytes": options.copies * n_bytes, "speed": {}, "memory": {}}
        _write_copies(work / "text", texts, options.copies)
        _write_copies(work / "more", texts, 10 * options.copies)
        for tokenizer in options.tokenizer.split(","):
            for count in counts:
                results["speed"][f"{tokenizer}, {count} workers"] = _compare(work, tokenizer, count, options.rounds)
            results["memory"][tokenizer] = {
                f"{times}x": _run(work, "prep", folder, tokenizer, counts[-1])["peak_mib"]
                for times, folder in ((1, "text"), (10, "more"))
            }
            write(results, options.output)
    return 0


def _compare(work: Path, tokenizer: str, workers: int, rounds: int) -> dict[str, Any]:
    contenders = [name for name in _CONTENDERS if name != "datatrove" or find_spec("datatrove")]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name in contenders if number == 0 else _CONTENDERS[:2]:
            runs[name].append(_run(work, name, "text", tokenizer, workers))
    best = {name: min(some, key=lambda run: run["seconds"]) for name, some in runs.items()}
    figures: dict[str, Any] = {name: best.get(name) for name in _CONTENDERS}
    for name in ("tiktoken", "datatrove"):
        if name in best:
            figures[f"prep_over_{name}"] = round(best[name]["seconds"] / best["prep"]["seconds"], 3)
    return figures


def _run(work: Path, contender: str, folder: str, tokenizer: str, workers: int) -> dict[str, Any]:
    output = work / "output"
    vocabulary = work / f"{tokenizer}.json"
    if not vocabulary.exists():
        vocabulary.write_text(json.dumps(tokenizer_json(load_tokenizer(tokenizer))))
    command = [sys.executable, "-m", "nmoe.data.bench.contenders", contender]
    cores = sorted(os.sched_getaffinity(0))[:workers]
    if len(cores) < workers:
        raise SystemExit(f"expected {workers} cores, found {len(cores)}: lower --workers")
    command += [str(work / folder), tokenizer, str(vocabulary), ",".join(map(str, cores)), str(output)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    shutil.rmtree(output, ignore_errors=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _write_copies(folder: Path, texts: Iterable[str], copies: int) -> None:
    folder.mkdir()
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    for number in range(copies):
        (folder / f"{number:03d}.jsonl").write_text(lines)
