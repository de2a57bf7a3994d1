"""`python -m nmoe.data.bench loader`: tokens a second out of the page cache, opening many shards, resuming far in.

Everything is made for the measurement in a temporary folder, of random tokens in documents of 700 on average. Each
figure is the median of the rounds. What is timed:

- `tokens_per_s`: batches of 8 samples of S tokens as int64 copies, each of which is summed, in one process and thread;
- `mixture_tokens_per_s`: the same from three sources; `documents_tokens_per_s`: with document starts and targets too;
- `open_s`: from a folder of `shards` shards to the first batch; `manifest_bytes` is the size of its manifest;
- `resume_s`, `mixture_resume_s`: from a folder to the batch at sample 10^11.
"""

import argparse
import shutil
import time
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from nmoe.data.bench.results import header, write
from nmoe.data.documents import Documents
from nmoe.data.loader import Loader
from nmoe.data.manifest import FileRecord, Manifest, ShardRecord, TokenizerRecord, write_manifest
from nmoe.data.mixture import Mixture, MixtureSource
from nmoe.data.plan import Plan, make_plan
from nmoe.data.shards import ShardSet, file_sha256

_VOCABULARY, _EOS = 50_257, 50_256
_BATCH = 8
_FAR = 10**11
_WEIGHTS = ("0.5", "0.3", "0.2")


def main(arguments: Sequence[str]) -> int:
    """Measures and writes; gives the exit code."""
    parser = argparse.ArgumentParser(prog="python -m nmoe.data.bench loader", description=__doc__)
    parser.add_argument("--tokens", type=int, default=1 << 27, help="in the set that is read; %(default)s")
    parser.add_argument("--seq-len", type=int, default=4096, help="%(default)s")
    parser.add_argument("--shards", type=int, default=10_000, help="in the set that is opened; %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="%(default)s")
    parser.add_argument("--output", type=Path, default=None, help="a JSON file; standard output if left out")
    options = parser.parse_args(arguments)
    with TemporaryDirectory() as folder:
        figures = _measure(Path(folder), options.tokens, options.seq_len, options.shards, options.rounds)
    settings = {"tokens": options.tokens, "seq_len": options.seq_len, "shards": options.shards, "batch": _BATCH}
    write({**header("loader", arguments), **settings, **figures}, options.output)
    return 0


def _measure(folder: Path, n_tokens: int, seq_len: int, n_shards: int, rounds: int) -> dict[str, Any]:
    large, many = folder / "large", folder / "many"
    write_set(large, n_shards=4, shard_tokens=n_tokens // 4)
    write_set(many, n_shards=n_shards, shard_tokens=seq_len)
    shards = ShardSet.open(large)
    plan = _plan(shards.n_tokens, seq_len)
    single = Loader(shards, seq_len, seed=0)
    mixed = Loader.of_plan(plan, dict.fromkeys(plan.sources, shards), seed=0)
    documents = Documents(_EOS, masking=True, loss_mask_eos=True)
    batches = single.samples_per_epoch // _BATCH

    def read(loader: Loader, documents: Documents | None = None) -> float:
        total = 0
        for number in range(batches):
            sample_BS1 = loader.batch(number * _BATCH, _BATCH)
            total += int(sample_BS1.sum())
            if documents is not None:
                documents.starts(sample_BS1)
                documents.targets(sample_BS1)
        return float(total)

    read(single)  # into the page cache
    tokens = batches * _BATCH * seq_len
    return {
        "tokens_per_s": round(tokens / _seconds(lambda: read(single), rounds)),
        "mixture_tokens_per_s": round(tokens / _seconds(lambda: read(mixed), rounds)),
        "documents_tokens_per_s": round(tokens / _seconds(lambda: read(single, documents), rounds)),
        "open_s": _seconds(lambda: Loader(ShardSet.open(many), seq_len, seed=0).batch(0, _BATCH), rounds),
        "manifest_bytes": (many / "manifest.json").stat().st_size,
        "resume_s": _seconds(lambda: Loader(ShardSet.open(large), seq_len, seed=0).batch(_FAR, _BATCH), rounds),
        "mixture_resume_s": _seconds(lambda: _resume(large, seq_len), rounds),
    }


def _resume(folder: Path, seq_len: int) -> None:
    shards = ShardSet.open(folder)
    plan = _plan(shards.n_tokens, seq_len)
    Loader.of_plan(plan, dict.fromkeys(plan.sources, shards), seed=0).batch(_FAR, _BATCH)


def _plan(tokens: int, seq_len: int) -> Plan:
    sources = tuple(
        MixtureSource(name=f"source{i}", path="here", weight=Decimal(weight)) for i, weight in enumerate(_WEIGHTS)
    )
    return make_plan(Mixture(source=sources), {source.name: tokens for source in sources}, seq_len)


def _seconds(call: Callable[[], object], rounds: int) -> float:
    took = []
    for _ in range(rounds):
        begun = time.perf_counter()
        call()
        took.append(time.perf_counter() - begun)
    return median(took)


def write_set(folder: Path, *, n_shards: int, shard_tokens: int) -> None:
    """A shard set of random tokens in documents of 700 tokens on average, every shard a copy of the first one."""
    folder.mkdir()
    tokens = np.random.default_rng(0).integers(0, _EOS, shard_tokens, np.uint32)
    tokens[np.random.default_rng(1).integers(0, shard_tokens, shard_tokens // 700)] = _EOS
    tokens[-1] = _EOS
    stops = np.flatnonzero(tokens == _EOS) + 1
    index = np.concatenate(([0], stops[:-1])).astype(np.int64)
    files = []
    for name, array in (("npy", tokens), ("idx", index)):
        path = folder / f"shard_00000.{name}"
        with open(path, "wb") as handle:
            np.lib.format.write_array(handle, array)
        files.append(FileRecord(name=path.name, bytes=path.stat().st_size, sha256=file_sha256(path)))
    records = []
    for number in range(n_shards):
        named = [file.model_copy(update={"name": f"shard_{number:05}{Path(file.name).suffix}"}) for file in files]
        if number:
            for file, copy in zip(files, named, strict=True):
                shutil.copyfile(folder / file.name, folder / copy.name)
        records.append(ShardRecord(tokens=named[0], index=named[1], n_tokens=shard_tokens, n_documents=index.size))
    manifest = Manifest(
        tool="nmoe.data.bench",
        tokenizer=TokenizerRecord(name="random", fingerprint="0" * 64, n_vocab=_VOCABULARY, eos_id=_EOS),
        n_tokens=n_shards * shard_tokens,
        n_documents=n_shards * index.size,
        n_bytes=n_shards * shard_tokens,
        source={"kind": "random"},
        shards=records,
    )
    write_manifest(folder, manifest)
