"""Answers score requests with a model, in batches, on one rank or many.

Shapes: B rows, S tokens of a row, D model width, V vocabulary, U places whose state is read, P predicted tokens, C rows
of a chunk.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from nmoe.eval.errors import EvalError
from nmoe.eval.lockstep import gather, of_rank
from nmoe.eval.packing import PackedBatch, batches_of, pack, rows_of, scored
from nmoe.eval.requests import Score, ScoreRequest
from nmoe.kernels.reference.matmul import mm_into
from nmoe.model.branches import Branches
from nmoe.model.transformer import Transformer
from nmoe.rdep.world import World, alone

Progress = Callable[[int, int], None]
"""Is told how much of how much is done, on every rank."""

_CHUNK_ELEMENTS = 1 << 26
"""Logits at once: 256 MiB in fp32, whatever V is."""


class Engine:
    """A model that answers requests.

    On several ranks each calls the same methods with the same arguments, and gets the same answers. What is computed
    together does not depend on the number of ranks.

    Args:
        model: its training mode is left as it was.
        max_length: tokens that the model sees at once; longer contexts are cropped from the left.
        max_tokens: of a forward call, padding included; of a model whose experts are spread over ranks, at most what
            its transport was opened for.
        world: the ranks; None: this one alone.

    Raises:
        EvalError: `max_tokens` is less than `max_length`.
    """

    def __init__(self, model: Transformer, *, max_length: int, max_tokens: int, world: World | None = None) -> None:
        if not 1 <= max_length <= max_tokens:
            raise EvalError(
                f"expected room for one sequence of {max_length} tokens in a forward call, found {max_tokens}: raise "
                "--max-tokens, or lower the length"
            )
        self.model, self.max_length, self.max_tokens = model, max_length, max_tokens
        self.device = model.head.weight.device
        self.world = alone(self.device) if world is None else world

    @torch.no_grad()
    def score(self, requests: Sequence[ScoreRequest], progress: Progress | None = None) -> list[Score]:
        """The answers, in the order of the requests; on every rank.

        Raises:
            RequestError: no model could answer one of them. Raised on every rank, before anything is computed.
        """
        sequences = scored(requests, self.max_length)
        batches = batches_of(rows_of(sequences, self.max_tokens), self.max_tokens)
        sizes = [sum(row.n_tokens for row in batch) for batch in batches]
        logprob_N = np.zeros(len(requests))
        greedy_N = np.ones(len(requests), np.bool_)
        mine: set[int] = set()
        done, total = 0, sum(sizes)
        training = self.model.training
        self.model.eval()
        try:
            pending: tuple[PackedBatch, torch.Tensor] | None = None
            for turn, batch in enumerate(of_rank(batches, self.world)):
                launched = None
                if batch is None:
                    self._dummy()
                else:
                    packed = pack(batch)
                    launched = packed, self._forward(packed)
                # The one before is read only now: the device computes while the host packs.
                if pending is not None:
                    mine |= _collect(*pending, logprob_N, greedy_N)
                pending = launched
                done += sum(sizes[turn * self.world.size : (turn + 1) * self.world.size])
                if progress is not None:
                    progress(done, total)
            if pending is not None:
                mine |= _collect(*pending, logprob_N, greedy_N)
        finally:
            self.model.train(training)
        found = {number: (float(logprob_N[number]), bool(greedy_N[number])) for number in sorted(mine)}
        answers = gather(self.world, "eval scores", found, len(requests))
        return [
            Score(logprob, greedy, len(each.targets), each.n_cropped)
            for (logprob, greedy), each in zip(answers, sequences, strict=True)
        ]

    def _dummy(self) -> None:
        """One token through every layer: the others may need this rank's experts."""
        self.model.hidden(torch.zeros((1, 1), dtype=torch.int64, device=self.device))

    def _forward(self, batch: PackedBatch) -> torch.Tensor:
        """(2, P): log-probability of each predicted token, and whether it is the likeliest one."""
        token_BS, trunk = self._tensor(batch.token_BS), batch.trunk
        # Batches differ in shape, and cuDNN takes a quarter of a second to plan each: the native kernels for documents,
        # of which every row is one, take any shape.
        native = self.model.ops.tier == "native"
        start_BS = torch.zeros((len(token_BS), trunk), dtype=torch.int32, device=self.device) if native else None
        if trunk < token_BS.shape[1]:
            position_BS, until_BS = self._tensor(batch.position_BS), self._tensor(batch.until_BS)
            state_BSD = self.model.hidden(token_BS, branches=Branches(position_BS, until_BS, trunk, start_BS))
        else:
            state_BSD = self.model.hidden(token_BS, document_start_BS=start_BS)
        place_U, start_U = np.unique(batch.place_P, return_index=True)
        state_UD = state_BSD.flatten(0, 1)[self._tensor(place_U)]
        bounds = [*start_U.tolist(), len(batch.place_P)]
        of_place_P = np.repeat(np.arange(len(place_U)), np.diff(bounds))
        return score_tokens(
            state_UD, self.model.head.weight, bounds, self._tensor(of_place_P), self._tensor(batch.target_P)
        )

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device, non_blocking=True)


def score_tokens(
    state_UD: torch.Tensor,
    weight_VD: torch.Tensor,
    bounds: Sequence[int],
    state_P: torch.Tensor,
    target_P: torch.Tensor,
) -> torch.Tensor:
    """Log-probabilities of tokens after states, in chunks of rows: (U, V) logits never exist.

    Args:
        state_UD: states after the final norm.
        weight_VD: the output head.
        bounds: U + 1 numbers: state u predicts tokens `bounds[u]` to `bounds[u + 1] - 1`.
        state_P: int64: which state each token follows, never decreasing.
        target_P: int64 ids below V.

    Returns:
        (2, P) in fp32 or wider: the log-probabilities, and 1 where the token is the likeliest one, else 0.
    """
    wide = torch.promote_types(state_UD.dtype, torch.float32)
    out_2P = torch.empty(2, len(target_P), dtype=wide, device=state_UD.device)
    n_states, vocab = len(state_UD), len(weight_VD)
    rows = max(1, min(n_states, _CHUNK_ELEMENTS // vocab))
    logits_CV = torch.empty(rows, vocab, dtype=wide, device=state_UD.device)
    for start in range(0, n_states, rows):
        stop = min(start + rows, n_states)
        here = slice(bounds[start], bounds[stop])
        logits = logits_CV[: stop - start]
        mm_into(logits, state_UD[start:stop], weight_VD.t(), add=False)
        row, target = state_P[here] - start, target_P[here]
        best_C = logits.argmax(-1)
        logit = logits[row, target]
        largest_C1 = logits.gather(1, best_C[:, None])
        # In place, so that there is one array of this size.
        lse_C = logits.sub_(largest_C1).exp_().sum(-1).log_().add_(largest_C1[:, 0])
        out_2P[0, here] = logit - lse_C[row]
        out_2P[1, here] = (best_C[row] == target).to(wide)
    return out_2P


def _collect(batch: PackedBatch, told_2P: torch.Tensor, logprob_N: np.ndarray, greedy_N: np.ndarray) -> set[int]:
    """Adds up what a batch tells of its requests, in fp64; returns their numbers."""
    told = told_2P.double().cpu().numpy()
    np.add.at(logprob_N, batch.request_P, told[0])
    np.logical_and.at(greedy_N, batch.request_P, told[1] > 0)
    return set(batch.request_P.tolist())
