"""Text to ids, many texts at once."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from nmoe.eval.requests import Tokenizer

_MOST_THREADS = 16


def encode_all(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text. Tokenizers that leave Python while they work do so on several threads."""
    threads = min(_MOST_THREADS, os.cpu_count() or 1)
    if threads == 1 or len(texts) < 2 * threads:
        return [tokenizer.encode(text) for text in texts]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(tokenizer.encode, texts))


def encode_pairs(tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
    """A context and its continuation, as lm-evaluation-harness divides them (`TemplateLM._encode_pair`): white space at
    a context's end belongs to the continuation, whose ids are those of both texts together behind the context's own.

    An empty context is the end-of-text token. Where the two together have no more ids than the context alone, the
    continuation has none.
    """
    moved = [_move_spaces(*pair) for pair in pairs]
    contexts = list(dict.fromkeys(context for context, _ in moved if context))
    wholes = encode_all(tokenizer, [*contexts, *(context + continuation for context, continuation in moved)])
    ids_of = dict(zip(contexts, wholes, strict=False))
    found = []
    for (context, _), whole in zip(moved, wholes[len(contexts) :], strict=True):
        if context:
            found.append((ids_of[context], whole[len(ids_of[context]) :]))
        else:
            found.append(([tokenizer.eos_id], whole))
    return found


def _move_spaces(context: str, continuation: str) -> tuple[str, str]:
    kept = context.rstrip() if context else context
    return kept, context[len(kept) :] + continuation
