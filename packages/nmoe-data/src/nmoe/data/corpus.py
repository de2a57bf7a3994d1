"""Text that is at hand without any download."""

import platform
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Literal

from nmoe.data.errors import ArgumentError, CorpusUnavailableError, OutputExistsError
from nmoe.data.guards import check_tokenizer
from nmoe.data.prep import prepare_documents
from nmoe.data.shards import ShardSet
from nmoe.data.tokenizers import Tokenizer

_PARAGRAPH = re.compile(r"\n\s*\n")


def corpus_description(name: Literal["pydoc"]) -> str:
    """One sentence that says what a corpus is, for people."""
    _check_name(name)
    return (
        "the Python language reference as it ships with this Python (pydoc_data.topics), repeated paragraphs dropped, "
        "the last tenth of its topics kept for validation"
    )


def pydoc_documents() -> list[str]:
    """The topics that `help()` shows, in sorted order, one document each.

    Two fifths of the paragraphs repeat; each is kept where it comes first, compared after folding white space, and a
    topic without any of its own is left out. Raises CorpusUnavailableError where Python came without pydoc's text.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise CorpusUnavailableError(
            "corpus 'pydoc'",
            expected="the standard library's pydoc_data.topics",
            found=str(error),
            remedy="Install the whole standard library, or set data.path to text of your own (n data prep).",
        ) from error
    return unique_paragraphs(topics)


def unique_paragraphs(topics: Mapping[str, str]) -> list[str]:
    """The values in the keys' sorted order, each paragraph only where it comes first."""
    seen: set[str] = set()
    documents = []
    for topic in sorted(topics):
        own = []
        for paragraph in _PARAGRAPH.split(topics[topic]):
            folded = " ".join(paragraph.split())
            if folded and folded not in seen:
                seen.add(folded)
                own.append(paragraph)
        if own:
            documents.append("\n\n".join(own))
    return documents


def prepare_corpus(name: Literal["pydoc"], tokenizer: Tokenizer, root: Path) -> Path:
    """The folder `root/pydoc-<tokenizer>` with `train/` and `val/`, prepared on first use.

    Safe with several processes at once: one of them wins and all use its result. Raises CorpusUnavailableError,
    WriteError, ShardSetError if what is there is damaged, and TokenizerMismatchError if another tokenizer made it.
    """
    _check_name(name)
    output = root / f"{name}-{tokenizer.name}"
    if not output.exists():
        source = {"kind": "corpus", "corpus": name, "python": platform.python_version()}
        # If another process is first, its tokens are checked like any others.
        with suppress(OutputExistsError):
            prepare_documents(_split(pydoc_documents()), tokenizer, output, source=source)
    for part in ("train", "val"):
        check_tokenizer(ShardSet.open(output / part), tokenizer)
    return output


def _split(documents: list[str]) -> dict[Literal["train", "val"], list[str]]:
    n_train = len(documents) - max(1, round(len(documents) / 10))
    return {"train": documents[:n_train], "val": documents[n_train:]}


def _check_name(name: str) -> None:
    if name != "pydoc":
        raise ArgumentError("corpus", expected="'pydoc'", found=repr(name), remedy="Choose it.")
