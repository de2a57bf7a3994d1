"""Answers requests for text: many at once, with a KV cache, each row until it ends.

Prompts of a batch are padded on the left, so that all end at the same position; attention never sees the padding, and
RoPE's scores depend on differences of positions alone. Samples of one prompt share its computation. Rows that have
ended leave the batch once they are half of it.

Shapes: B rows of a batch, L positions, V ids.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from nmoe.eval.errors import RequestError
from nmoe.eval.lockstep import gather, of_rank
from nmoe.eval.requests import GenerateRequest, Text, Tokenizer
from nmoe.model.cache import Cache
from nmoe.model.transformer import Transformer
from nmoe.rdep.world import World, alone

STEPS_TOGETHER = 16
"""Of several ranks: tokens between two looks whether any of them has a row left. Those that have none compute something
small meanwhile."""


@dataclass(frozen=True)
class _Row:
    """One text to be made."""

    request: int
    sample: int


@torch.inference_mode()
def generate_texts(
    model: Transformer,
    tokenizer: Tokenizer,
    requests: Sequence[GenerateRequest],
    *,
    max_tokens: int,
    max_length: int,
    world: World | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[tuple[Text, ...]]:
    """The texts of each request, the same on every rank.

    A text depends neither on the number of ranks nor, but for rounding, on what else is asked.

    Args:
        model: in evaluation mode.
        tokenizer: of the model; its end-of-text token ends a text.
        requests: what to continue.
        max_tokens: bound on a batch: rows times the longest prompt and text together. A row goes alone if need be.
        max_length: positions that the model sees; a prompt that leaves no room for its text loses tokens on the left.
        world: the ranks, which call this together; None: this one alone.
        progress: told how many texts of how many the ranks have made.

    Raises:
        RequestError: a prompt is empty, or a text has no room; names the request's number.
    """
    device = model.head.weight.device
    world = alone(device) if world is None else world
    prompts = [_cropped(number, request, max_length) for number, request in enumerate(requests)]
    batches = plan(requests, [len(prompt) for prompt in prompts], max_tokens)
    made: dict[int, dict[str, object]] = {}
    numbers = _numbers(requests)
    done = 0
    for turn, rows in enumerate(of_rank(batches, world)):
        writers = [
            _Writer(tokenizer, requests[row.request], row.sample, len(requests[row.request].prompt) - len(prompt))
            for row in rows or ()
            for prompt in [prompts[row.request]]
        ]
        _write(model, tokenizer, rows or [], prompts, writers, world)
        for row, writer in zip(rows or (), writers, strict=True):
            made[numbers[row]] = asdict(writer.text())
        done += sum(map(len, batches[turn * world.size : (turn + 1) * world.size]))
        if progress is not None:
            progress(done, len(numbers))
    texts = [Text(**fields) for fields in gather(world, "texts", made, len(numbers))]
    answers, first = [], 0
    for request in requests:
        answers.append(tuple(texts[first : first + request.n]))
        first += request.n
    return answers


def plan(requests: Sequence[GenerateRequest], lengths: Sequence[int], max_tokens: int) -> list[list[_Row]]:
    """Rows in batches, the longest prompts first; samples of one prompt stand together."""
    order = sorted(range(len(requests)), key=lambda number: (-lengths[number], number))
    batches: list[list[_Row]] = []
    longest = 0
    for number in order:
        for sample in range(requests[number].n):
            wanted = lengths[number] + requests[number].max_new
            if not batches or (len(batches[-1]) + 1) * max(longest, wanted) > max_tokens:
                batches.append([])
                longest = 0
            batches[-1].append(_Row(number, sample))
            longest = max(longest, wanted)
    return batches


def choose(
    logits_BV: torch.Tensor, temperature_B: torch.Tensor, top_p_B: torch.Tensor, uniform_B: torch.Tensor
) -> torch.Tensor:
    """An id a row, int64 (B): the likeliest where the temperature is 0, else the one at which the cumulated probability
    of the likeliest ids passes `uniform`, a number below 1 that was drawn for this row and place.

    Args:
        logits_BV: of the next token.
        temperature_B: 0 is greedy.
        top_p_B: nucleus: the smallest set of likeliest ids with at least this probability (arXiv:1904.09751).
        uniform_B: fp64.
    """
    greedy_B = logits_BV.argmax(-1)
    hot_B = temperature_B > 0
    if not bool(hot_B.any()):
        return greedy_B
    scaled_BV = logits_BV.double() / torch.where(hot_B, temperature_B, 1.0)[:, None]
    probability_BV, id_BV = scaled_BV.softmax(-1).sort(dim=-1, descending=True, stable=True)
    before_BV = probability_BV.cumsum(-1) - probability_BV
    # The likeliest id is in the nucleus, however small: its `before` is 0, up to rounding.
    out_BV = before_BV >= top_p_B[:, None]
    out_BV[:, 0] = False
    nucleus_BV = probability_BV.masked_fill(out_BV, 0.0)
    sum_BV = nucleus_BV.cumsum(-1)
    place_B1 = torch.searchsorted(sum_BV, (uniform_B * sum_BV[:, -1])[:, None], right=True)
    last_B1 = (~out_BV).sum(-1, keepdim=True) - 1
    sampled_B = id_BV.gather(1, torch.minimum(place_B1, last_B1))[:, 0]
    return torch.where(hot_B, sampled_B, greedy_B)


class _Writer:
    """A text while it is made."""

    def __init__(self, tokenizer: Tokenizer, request: GenerateRequest, sample: int, n_cropped: int) -> None:
        self._tokenizer, self.request, self._n_cropped = tokenizer, request, n_cropped
        self._ids: list[int] = []
        self._ended: str | None = None
        # A token that is no special one has a byte at least: what ends in the newest of them is in the last so many.
        self._reach = max((len(stop.encode()) for stop in request.stops), default=0)
        seed = hashlib.sha256(f"{request.seed}/{sample}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(seed[:7], "little"))
        self.uniform = torch.rand(request.max_new, dtype=torch.float64, generator=generator)

    @property
    def goes_on(self) -> bool:
        """Whether another token is wanted."""
        return self._ended is None

    def add(self, token: int) -> None:
        """Takes the next token."""
        self._ids.append(token)
        if token == self._tokenizer.eos_id:
            self._ended = "eos"
        elif self.request.stops and self._has_stop(self._tokenizer.decode(self._ids[-self._reach :])):
            self._ended = "stop"
        elif len(self._ids) == self.request.max_new:
            self._ended = "length"

    def text(self) -> Text:
        """What was made, before the first stop."""
        assert self._ended is not None, "the text has ended"
        ids = self._ids[:-1] if self._ended == "eos" else self._ids
        text = self._tokenizer.decode(ids)
        ends = [place for stop in self.request.stops if (place := text.find(stop)) >= 0]
        ended = "stop" if ends else self._ended
        return Text(text[: min(ends, default=None)], len(self._ids), ended, self._n_cropped)  # type: ignore[arg-type]

    def _has_stop(self, text: str) -> bool:
        return any(stop in text for stop in self.request.stops)


def _write(
    model: Transformer,
    tokenizer: Tokenizer,
    rows: Sequence[_Row],
    prompts: Sequence[Sequence[int]],
    writers: Sequence[_Writer],
    world: World,
) -> None:
    """Makes the texts of a batch, which may be empty. Every rank makes the same number of forward calls."""
    batch = _Batch(model, tokenizer, rows, prompts, writers) if rows else None
    steps, going = 0, True
    while going:
        if batch is None or not batch.goes_on:
            model.hidden(torch.full((1, 1), tokenizer.eos_id, device=model.head.weight.device))
        else:
            batch.step()
        steps += 1
        going = batch is not None and batch.goes_on
        if world.size > 1:
            # The first call is the prompts', long ones among them; a text has more than one token, as a rule.
            if (steps - 1) % STEPS_TOGETHER:
                going = True
                continue
            left = torch.tensor([int(going)], dtype=torch.int32, device=world.device)
            world.sum_(left)
            going = bool(left)


class _Batch:
    """Rows that are written side by side."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        rows: Sequence[_Row],
        prompts: Sequence[Sequence[int]],
        writers: Sequence[_Writer],
    ) -> None:
        self._model, self._device = model, model.head.weight.device
        self._n_ids = min(tokenizer.n_vocab, model.config.vocab_size)
        self._asked = list(dict.fromkeys(row.request for row in rows))
        self._prompts = [prompts[request] for request in self._asked]
        self._rows = rows
        self._writers = list(writers)
        """Of the rows that are in the cache, in their order."""
        longest = max(map(len, self._prompts))
        self._cache = Cache(model.config.n_layers, longest + max(writer.request.max_new for writer in writers))
        self._made = 0
        self._newest_B1 = torch.empty(0, 1, dtype=torch.int64, device=self._device)
        self._eos_id = tokenizer.eos_id

    @property
    def goes_on(self) -> bool:
        """Whether any text lacks a token."""
        return any(writer.goes_on for writer in self._writers)

    def step(self) -> None:
        """One forward call: of the prompts, then of the newest token of each row."""
        if self._made == 0:
            logits_BV = self._logits(*self._padded())
            place = {request: number for number, request in enumerate(self._asked)}
            self._keep([place[row.request] for row in self._rows])
            logits_BV = logits_BV[[place[row.request] for row in self._rows]]
        else:
            self._drop_ended()
            logits_BV = self._logits(self._newest_B1, self._pad_B1)
        token_B = choose(logits_BV, self._temperature_B, self._top_p_B, self._uniform_BN[:, self._made])
        self._made += 1
        self._newest_B1 = token_B[:, None]
        for writer, token in zip(self._writers, token_B.tolist(), strict=True):
            if writer.goes_on:
                writer.add(token)

    def _logits(self, token_BS: torch.Tensor, start_BS: torch.Tensor) -> torch.Tensor:
        state_BSD = self._model.hidden(token_BS, self._cache, document_start_BS=start_BS)
        return self._model.head(state_BSD[:, -1])[:, : self._n_ids].float()

    def _padded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The prompts, each with padding before it, (B, L), and the first position that each place sees: a prompt's own
        first, and of padding itself."""
        longest = max(map(len, self._prompts))
        pads = [longest - len(prompt) for prompt in self._prompts]
        token_BL = [[self._eos_id] * pad + list(prompt) for pad, prompt in zip(pads, self._prompts, strict=True)]
        self._pad_B1 = torch.tensor(pads, dtype=torch.int32, device=self._device)[:, None]
        position_L = torch.arange(longest, dtype=torch.int32, device=self._device)
        return torch.tensor(token_BL, device=self._device), torch.minimum(position_L, self._pad_B1)

    def _keep(self, rows: list[int]) -> None:
        row_B = torch.tensor(rows, device=self._device)
        self._cache.select(row_B)
        self._pad_B1 = self._pad_B1[row_B]
        asked = [writer.request for writer in self._writers]
        longest = max(request.max_new for request in asked)
        uniform_BN = torch.zeros(len(asked), longest, dtype=torch.float64)
        for row, writer in enumerate(self._writers):
            uniform_BN[row, : writer.request.max_new] = writer.uniform
        self._uniform_BN = uniform_BN.to(self._device)
        options_2B = [[request.temperature for request in asked], [request.top_p for request in asked]]
        self._temperature_B, self._top_p_B = torch.tensor(options_2B, dtype=torch.float64, device=self._device)

    def _drop_ended(self) -> None:
        going = [row for row, writer in enumerate(self._writers) if writer.goes_on]
        if len(going) * 2 <= len(self._writers):
            self._newest_B1 = self._newest_B1[torch.tensor(going, device=self._device)]
            self._writers = [self._writers[row] for row in going]
            self._keep(going)


def _cropped(number: int, request: GenerateRequest, max_length: int) -> tuple[int, ...]:
    room = max_length - request.max_new
    if not request.prompt or request.max_new < 1 or request.n < 1:
        raise RequestError(
            f"request {number}: expected a prompt of at least one token, and at least one token and one text to make, "
            f"found {len(request.prompt)}, {request.max_new} and {request.n}"
        )
    if room < 1:
        raise RequestError(
            f"request {number}: expected fewer tokens to make than the model sees, {max_length}, found "
            f"{request.max_new}: the text has no room"
        )
    return request.prompt[-room:]


def _numbers(requests: Sequence[GenerateRequest]) -> dict[_Row, int]:
    rows = [_Row(number, sample) for number, request in enumerate(requests) for sample in range(request.n)]
    return {row: number for number, row in enumerate(rows)}
