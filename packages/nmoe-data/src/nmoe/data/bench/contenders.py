"""One contender of `nmoe.data.bench.prep`, run as a process of its own; prints its figures as JSON."""

import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

_GAP_S = 0.2


def main() -> None:
    """`python -m nmoe.data.bench.contenders NAME TEXTS TOKENIZER TOKENIZER_JSON CORES OUTPUT`."""
    name, texts, tokenizer, vocabulary, cores, output = sys.argv[1:]
    held = [int(core) for core in cores.split(",")]
    os.sched_setaffinity(0, held)
    with redirect_stdout(sys.stderr):
        work = _CONTENDERS[name](Path(texts), tokenizer, Path(vocabulary), len(held), Path(output))
        peaks = _Peaks()
        start = time.perf_counter()
        n_tokens = work()
        seconds = time.perf_counter() - start
    figures = {"seconds": round(seconds, 3), "tokens": n_tokens, "tokens_per_s": round(n_tokens / seconds)}
    print(json.dumps({**figures, "peak_mib": peaks.stop()}))


def _tiktoken(texts: Path, tokenizer: str, vocabulary: Path, workers: int, output: Path) -> Callable[[], int]:
    import tiktoken

    encoding = tiktoken.get_encoding(tokenizer)
    documents = [json.loads(line)["text"] for file in sorted(texts.iterdir()) for line in file.open()]
    encoding.encode_ordinary(documents[0])
    return lambda: sum(map(len, encoding.encode_ordinary_batch(documents, num_threads=workers)))


def _prep(texts: Path, tokenizer: str, vocabulary: Path, workers: int, output: Path) -> Callable[[], int]:
    from nmoe.data.prep import prepare
    from nmoe.data.sources import open_source
    from nmoe.data.tokenizers import load_tokenizer

    loaded = load_tokenizer(tokenizer)

    def work() -> int:
        prepared = prepare(open_source("jsonl", [texts]), loaded, output, val_fraction=0.01, workers=workers)
        return prepared.train.n_tokens + (prepared.val.n_tokens if prepared.val else 0)

    return work


def _datatrove(texts: Path, tokenizer: str, vocabulary: Path, workers: int, output: Path) -> Callable[[], int]:
    from datatrove.executor import LocalPipelineExecutor  # type: ignore[import-not-found]
    from datatrove.pipeline.readers import JsonlReader  # type: ignore[import-not-found]
    from datatrove.pipeline.tokens import DocumentTokenizer  # type: ignore[import-not-found]

    step = DocumentTokenizer(
        output_folder=str(output / "tokens"),
        tokenizer_name_or_path=str(vocabulary),
        eos_token="<|endoftext|>",
        shuffle_documents=False,
        max_tokens_per_file=10**9,
    )

    def work() -> int:
        LocalPipelineExecutor(
            pipeline=[JsonlReader(str(texts)), step],
            tasks=workers,
            workers=workers,
            logging_dir=str(output / "logs"),
        ).run()
        size = 4 if tokenizer == "o200k_harmony" else 2
        return sum(file.stat().st_size for file in (output / "tokens").rglob("*.ds")) // size

    return work


_CONTENDERS: dict[str, Callable[[Path, str, Path, int, Path], Callable[[], int]]] = {
    "tiktoken": _tiktoken,
    "prep": _prep,
    "datatrove": _datatrove,
}


class _Peaks:
    """Peak resident memory of this process and of its children, looked up now and then in /proc."""

    def __init__(self) -> None:
        self._peaks: dict[int, int] = {}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> dict[str, Any]:
        """In MiB: of this process, and of the child that had most."""
        self._stopped.set()
        self._thread.join()
        own = self._peaks.pop(os.getpid(), 0)
        return {"main": own >> 10, "largest_worker": max(self._peaks.values(), default=0) >> 10}

    def _watch(self) -> None:
        while True:
            for process in (os.getpid(), *_children(os.getpid())):
                peak = _peak_kib(process)
                if peak:
                    self._peaks[process] = peak
            if self._stopped.wait(_GAP_S):
                return


def _children(process: int) -> list[int]:
    found: list[int] = []
    for thread in Path(f"/proc/{process}/task").iterdir():
        found += map(int, (thread / "children").read_text().split())
    return found


def _peak_kib(process: int) -> int:
    try:
        found = re.search(r"^VmHWM:\s*(\d+)", Path(f"/proc/{process}/status").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) if found else 0


if __name__ == "__main__":
    main()
