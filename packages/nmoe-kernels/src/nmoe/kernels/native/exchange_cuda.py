"""The exchange of token rows between GPUs that map each other's memory: launches of `exchange.cu`.

A token's row goes to each rank that owns one of its experts, once, and comes back as one sum a rank. Nothing is read
back to the host, every sum has one order, and all of it may be captured in a CUDA graph. Callers see to it that all
ranks make the same exchanges in one order, that kernels of one exchange follow each other in stream order, and that
tensors are contiguous, on one device (but those of peers), and of the shapes told here: `nmoe.rdep` does.

Shapes: T tokens of this rank, D width, K slots, W ranks, N most tokens of a rank, S = W·N slab rows, R most routed
rows, P parts of a row's gate gradient. Tuples hold one tensor a rank, each in that rank's memory.
"""

import ctypes
from collections.abc import Sequence

import torch
from nmoe.kernels.errors import ShapeError
from nmoe.kernels.reference.exchange import WAVES, WORDS, Plan, Returns, Slab
from nmoe.kernels.runtime.cuda_source import CudaSource
from nmoe.kernels.runtime.launch import CudaKernel

MOST_RANKS = 8
"""That exchange with each other."""

_ARCHES = ("sm_90a", "sm_100a")
_SHARED_BYTES = 200 * 1024
_TAIL_ROWS = 64
"""Rows of a stage of the weight gradients' products: what they may read after the last routed row."""

_DISPATCH_WARPS, _STAGES = (8, 4, 2, 1), 4
_RETURN_WARPS = (16, 8, 4, 2, 1)
_COLLECT_WARPS = 8
_DISPATCH_BLOCKS, _RETURN_BLOCKS, _COLLECT_BLOCKS = 64, 128, 256
"""At most. More dispatch no faster; what returns is first gathered, by all that there are."""
BLOCKS_BESIDE = 16
"""Of dispatch and return while products have the rest of the GPU: what all blocks move in nine tenths of the time."""
_FEW_TOKENS = 1024
"""Up to as many, collect waits itself, which saves a launch; its blocks then fill at most a third of the GPU. For more,
a warp waits before it, so that other streams' kernels have the GPU meanwhile."""
_WIDE = 2048
_CHOICES, _ALL = 0, 7  # parts of an exchange, as link.cuh has them
_DISPATCH_PHASE, _RETURN_PHASE, _GRADIENT_DISPATCH_PHASE, _GRADIENT_RETURN_PHASE = range(4)  # as link.cuh has them

_DISPATCH_SOURCES = {
    (plan, warps): CudaSource(
        f"dispatch_{'tokens' if plan else 'rows'}_{warps}",
        "exchange.cu",
        "dispatch",
        _ARCHES,
        (("WARPS", warps), ("STAGES", _STAGES), ("PLAN", plan), ("ROWS", 1)),
    )
    for plan in (0, 1)
    for warps in _DISPATCH_WARPS
}
_PLAN_WARPS = 32  # counting what comes before a block's tokens is what takes the time
_PLAN_SOURCE = CudaSource(
    "plan_tokens", "exchange.cu", "plan_tokens", _ARCHES, (("WARPS", _PLAN_WARPS), ("PLAN", 1), ("ROWS", 0))
)
_RETURN_SOURCES = {
    (kind, warps): CudaSource(
        f"return_{kind}_{warps}",
        "exchange.cu",
        "return_rows",
        _ARCHES,
        (("WARPS", warps), ("GATES", int(kind == "gradients")), ("READY", int(kind == "wave")), ("SEND", 1)),
    )
    for kind in ("rows", "wave", "gradients")
    for warps in _RETURN_WARPS
}
_COLLECT_SOURCES = {
    (gates, ranks): CudaSource(
        f"collect_{'gradients' if gates else 'rows'}_{ranks}",
        "exchange.cu",
        "collect_rows",
        _ARCHES,
        (("WARPS", _COLLECT_WARPS), ("GATES", gates), ("RANKS", ranks)),
    )
    for gates in (0, 1)
    for ranks in (2, 4, 8)
}
_AWAIT_SOURCE = CudaSource("await_words", "exchange.cu", "await_words", _ARCHES)
_CLEAR_SOURCE = CudaSource("clear_tail", "exchange.cu", "clear_tail", _ARCHES, (("TAIL", _TAIL_ROWS),))
SOURCES = (
    _PLAN_SOURCE,
    *_DISPATCH_SOURCES.values(),
    *_RETURN_SOURCES.values(),
    *_COLLECT_SOURCES.values(),
    _AWAIT_SOURCE,
    _CLEAR_SOURCE,
)
"""Every compile of this module."""

_PLAN = CudaKernel(_PLAN_SOURCE)
_DISPATCH = {key: CudaKernel(source) for key, source in _DISPATCH_SOURCES.items()}
_RETURN = {key: CudaKernel(source) for key, source in _RETURN_SOURCES.items()}
_COLLECT = {key: CudaKernel(source) for key, source in _COLLECT_SOURCES.items()}
_AWAIT, _CLEAR = CudaKernel(_AWAIT_SOURCE), CudaKernel(_CLEAR_SOURCE)

_Pointers = ctypes.c_void_p * MOST_RANKS


class LinkParams(ctypes.Structure):
    """`Link` in link.cuh."""

    _fields_ = (
        ("words", _Pointers),
        *((name, ctypes.c_void_p) for name in ("sequence", "record", "healthy", "gave_up")),
        ("timeout_ns", ctypes.c_int64),
        ("rank", ctypes.c_int),
        ("world", ctypes.c_int),
    )


class _DispatchParams(ctypes.Structure):
    _fields_ = (
        ("link", LinkParams),
        *((name, ctypes.c_void_p) for name in ("x", "expert", "gate", "ordinal", "end")),
        *((name, _Pointers) for name in ("slab", "slab_expert", "slab_gate", "slab_end")),
        ("used", ctypes.c_void_p * 2),
        ("done", ctypes.c_void_p),
        *((name, ctypes.c_int) for name in ("n_tokens", "top_k", "n_local", "row_bytes", "n_waves")),
    )


class _ReturnParams(ctypes.Structure):
    _fields_ = (
        ("link", LinkParams),
        *((name, ctypes.c_void_p) for name in ("y", "row", "count", "ready", "partial")),
        *((name, _Pointers) for name in ("returned", "returned_gate")),
        ("done", ctypes.c_void_p),
        *((name, ctypes.c_int) for name in ("most_tokens", "top_k", "row_pieces", "n_partials", "n_rows")),
        *((name, ctypes.c_int) for name in ("wave", "ends")),
    )


class _CollectParams(ctypes.Structure):
    _fields_ = (
        ("link", LinkParams),
        *((name, ctypes.c_void_p) for name in ("ordinal", "returned", "returned_gate", "expert", "out", "dgate")),
        ("done", ctypes.c_void_p),
        *((name, ctypes.c_int) for name in ("n_tokens", "most_tokens", "top_k", "n_local", "row_pieces", "waits")),
    )


class _AwaitParams(ctypes.Structure):
    _fields_ = (("link", LinkParams), ("phase", ctypes.c_int), ("part", ctypes.c_int))


class _ClearParams(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("end", "a", "b")),
        *((name, ctypes.c_int) for name in ("a_pieces", "b_pieces", "n_rows")),
    )


class Link:
    """What kernels know of the ranks: flags, faults, and the number of exchanges that have ended.

    Args:
        rank: this rank.
        words: int32 (WORDS·W) of each rank, at 0 when the first exchange begins.
        record: int32 words in host memory that the device can write; see `nmoe.rdep.faults`.
        healthy: int32 word on the device, 0 after a fault.
        timeout_s: how long a wait may take.
        device: this rank's GPU.

    Raises:
        ShapeError: there are more ranks than the kernels serve.
    """

    def __init__(
        self,
        rank: int,
        words: Sequence[torch.Tensor],
        record: torch.Tensor,
        healthy: torch.Tensor,
        timeout_s: float,
        device: torch.device,
    ) -> None:
        if not 2 <= len(words) <= MOST_RANKS:
            raise ShapeError(
                f"expected 2 to {MOST_RANKS} ranks that map each other's memory, found {len(words)}: start fewer"
            )
        if any(of_rank.numel() != WORDS * len(words) for of_rank in words):
            raise ShapeError(
                f"expected {WORDS * len(words)} words of each of {len(words)} ranks, found "
                f"{[of_rank.numel() for of_rank in words]}: allocate WORDS for each pair of ranks"
            )
        self.rank, self.world, self.device = rank, len(words), device
        # The exchanges' number, whether a wait was given up, counters of blocks for each kernel, and rows sent to each
        # owner up to the end of each wave, which the last block of a plan passes on.
        self._state = torch.zeros(16 + WAVES * MOST_RANKS, dtype=torch.int32, device=device)
        self._kept = (tuple(words), record, healthy)
        at = self._state.data_ptr()
        self.ends = at + 64
        self.done = {"return": at + 8, "collect": at + 12, "dispatch": at + 16}
        self.params = LinkParams(
            _pointers(words), at, record.data_ptr(), healthy.data_ptr(), at + 4, int(timeout_s * 1e9), rank, self.world
        )


def make_plan(link: Link, expert_TK: torch.Tensor) -> Plan:
    """Where the tokens of `expert_TK`, int32 global experts, will go: filled by their dispatch."""
    return Plan(expert_TK, expert_TK.new_empty(expert_TK.shape[0], link.world))


def waves_for(most_tokens: int, width: int) -> int:
    """In how many waves tokens should travel where ranks have at most N, of width D. In one where that is soon over, or
    where rows are so narrow that a part of the GPU moves them much slower than all of it."""
    return 1 if most_tokens <= _FEW_TOKENS or width < _WIDE else WAVES


def dispatch_tokens(
    link: Link, slab: Slab, x_TD: torch.Tensor, gate_TK: torch.Tensor, plan: Plan, n_local: int, *, n_waves: int
) -> None:
    """Sends each token, with its experts and gates, to the owners of its experts. Begins an exchange.

    Waits until the owners have read what the slab held.

    Args:
        link: of the ranks.
        slab: where tokens land.
        x_TD: bf16; D a multiple of 8, T ≤ N.
        gate_TK: fp32.
        plan: of `make_plan`; this fills it.
        n_local: e, the experts of each rank.
        n_waves: 1 or WAVES, alike on all ranks. With several, owners can begin with the first while others travel, on
            less of the GPU.
    """
    params = _dispatch_params(link, slab.x_WND, x_TD, plan.ordinal_TW)
    params.expert, params.gate, params.end = plan.expert_TK.data_ptr(), gate_TK.data_ptr(), link.ends
    params.slab_expert = _pointers([part[link.rank] for part in slab.expert_WNK])
    params.slab_gate = _pointers([part[link.rank] for part in slab.gate_WNK])
    params.slab_end = _pointers([end_CW[:, link.rank] for end_CW in slab.end_CW])
    params.used[0] = slab.used.data_ptr()
    params.top_k, params.n_local = plan.expert_TK.shape[1], n_local
    params.n_waves = n_waves
    if n_waves == 1:
        _launch_dispatch(link, params, plan=1)
        return
    blocks = max(1, min(_DISPATCH_BLOCKS, -(-params.n_tokens // _PLAN_WARPS)))
    with torch.cuda.device(link.device):
        _PLAN.launch((blocks, 1, 1), 32 * _PLAN_WARPS, 0, params, early=True)
    _launch_dispatch(link, params, plan=0)


def dispatch_gradients(link: Link, gradients: Slab, tokens: Slab, dout_TD: torch.Tensor, plan: Plan) -> None:
    """Sends each token's gradient where its token went. Begins an exchange.

    Args:
        link: of the ranks.
        gradients: where they land; only `x_WND` and `used` are looked at.
        tokens: the slab that `plan`'s tokens are in, which the owners read once more.
        dout_TD: bf16.
        plan: of the tokens' dispatch.
    """
    params = _dispatch_params(link, gradients.x_WND, dout_TD, plan.ordinal_TW)
    params.used[0], params.used[1] = gradients.used.data_ptr(), tokens.used.data_ptr()
    params.n_waves = 1
    _launch_dispatch(link, params, plan=0)


def await_choices(link: Link) -> None:
    """What follows in the stream finds the experts and gates of all tokens that come in this exchange, and may wait for
    their rows: on no rank does their dispatch wait any more. For tokens that travel in waves."""
    _await(link, _DISPATCH_PHASE, _CHOICES)


def await_rows(link: Link, *, gradients: bool) -> None:
    """What follows in the stream finds the rows that all sources dispatched in this exchange."""
    _await(link, _GRADIENT_DISPATCH_PHASE if gradients else _DISPATCH_PHASE, _ALL)


def await_returns(link: Link, *, gradients: bool) -> None:
    """What follows in the stream finds the sums that all owners returned in this exchange.

    Tells the owners that this rank has read all that it was sent so far.
    """
    _await(link, _GRADIENT_RETURN_PHASE if gradients else _RETURN_PHASE, _ALL)


def return_rows(
    link: Link,
    returns: Returns,
    y_RD: torch.Tensor,
    row_SK: torch.Tensor,
    count_W: torch.Tensor,
    partial_PR: torch.Tensor | None = None,
) -> None:
    """Sends each source the sums of its tokens' rows, in slot order, in fp32 and rounded once.

    Args:
        link: of the ranks.
        returns: where they land.
        y_RD: bf16 rows of this rank's experts.
        row_SK: int32: the row of each slot of each slab row, -1 where there is none.
        count_W: int32: slab rows of each source.
        partial_PR: fp32 parts of the gradients of the rows' gates, which are summed and sent too; or None.
    """
    params = _return_params(link, returns, y_RD, row_SK, count_W)
    if partial_PR is None:
        _launch_return(link, "rows", params, _RETURN_BLOCKS)
        return
    params.partial, params.n_partials = partial_PR.data_ptr(), partial_PR.shape[0]
    params.returned_gate = _pointers([part[link.rank] for part in returns.dgate_WNK])
    _launch_return(link, "gradients", params, _RETURN_BLOCKS)


def return_wave(
    link: Link,
    returns: Returns,
    y_RD: torch.Tensor,
    row_SK: torch.Tensor,
    end_CW: torch.Tensor,
    ready_S: torch.Tensor,
    wave: int,
) -> None:
    """As `return_rows`, of the slab rows that became ready with a wave. To be called for each wave, in order.

    After an overflow, which no rank's step survives, there are rows that return with none.

    Args:
        link: of the ranks.
        returns: where they land.
        y_RD: bf16 rows of this rank's experts, computed up to this wave.
        row_SK: int32: the row of each slot of each slab row, -1 where there is none.
        end_CW: int32: slab rows of each source up to the end of each wave.
        ready_S: of `Waves`.
        wave: c.
    """
    params = _return_params(link, returns, y_RD, row_SK, end_CW[wave])
    params.ready, params.wave, params.ends = ready_S.data_ptr(), wave, wave == end_CW.shape[0] - 1
    _launch_return(link, "wave", params, _RETURN_BLOCKS if params.ends else BLOCKS_BESIDE)


def collect_rows(link: Link, returns: Returns, plan: Plan, width: int) -> torch.Tensor:
    """The sum over owners of what they returned for each token, in rank order: (T, D) bf16. Ends the exchange.

    Waits for the owners, and tells them that this rank has read all that it was sent so far.
    """
    out_TD, _ = _collect(link, returns, plan, width, 0)
    return out_TD


def collect_gradients(
    link: Link, returns: Returns, plan: Plan, width: int, n_local: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `collect_rows`, of gradients; and those of the gates, fp32 (T, K)."""
    return _collect(link, returns, plan, width, n_local)


def clear_tail(a_RM: torch.Tensor, b_RN: torch.Tensor, offset_E: torch.Tensor) -> None:
    """Zeros in the rows that the weight gradients' products may read after the last routed row, `offset_E[-1]`.

    Args:
        a_RM, b_RN: bf16; M and N multiples of 8.
        offset_E: int32 (e + 1).
    """
    params = _ClearParams(
        offset_E[-1:].data_ptr(),
        a_RM.data_ptr(),
        b_RN.data_ptr(),
        a_RM.shape[1] // 8,
        b_RN.shape[1] // 8,
        a_RM.shape[0],
    )
    with torch.cuda.device(a_RM.device):
        _CLEAR.launch((_TAIL_ROWS, 1, 1), 256, 0, params)


def _dispatch_params(
    link: Link, slab: tuple[torch.Tensor, ...], rows_TD: torch.Tensor, ordinal_TW: torch.Tensor
) -> _DispatchParams:
    n_tokens, width = rows_TD.shape
    most_tokens = slab[0].shape[1]
    if n_tokens > most_tokens:
        raise ShapeError(
            f"expected at most {most_tokens} tokens of a rank, for which the ranks share memory, found {n_tokens}: "
            "give fewer at once"
        )
    return _DispatchParams(
        link=link.params,
        x=rows_TD.data_ptr(),
        ordinal=ordinal_TW.data_ptr(),
        slab=_pointers([part[link.rank] for part in slab]),
        done=link.done["dispatch"],
        n_tokens=n_tokens,
        row_bytes=width * 2,
    )


def _launch_dispatch(link: Link, params: _DispatchParams, *, plan: int) -> None:
    warps = _most_warps(_DISPATCH_WARPS, _STAGES * params.row_bytes)
    most = _DISPATCH_BLOCKS if params.n_waves == 1 else BLOCKS_BESIDE
    blocks = max(1, min(most, -(-params.n_tokens // warps)))
    with torch.cuda.device(link.device):
        shared_bytes = warps * _STAGES * params.row_bytes
        _DISPATCH[plan, warps].launch((blocks, 1, 1), 32 * warps, shared_bytes, params, early=True)


def _collect(link: Link, returns: Returns, plan: Plan, width: int, n_local: int) -> tuple[torch.Tensor, torch.Tensor]:
    own = returns.y_WND[link.rank]
    n_tokens, top_k = plan.expert_TK.shape
    gates = int(n_local > 0)
    waits = n_tokens <= _FEW_TOKENS
    if not waits:
        await_returns(link, gradients=gates == 1)
    out_TD = own.new_empty(n_tokens, width)
    dgate_TK = out_TD.new_empty(n_tokens if gates else 0, top_k, dtype=torch.float32)
    params = _CollectParams(
        link.params,
        plan.ordinal_TW.data_ptr(),
        own.data_ptr(),
        returns.dgate_WNK[link.rank].data_ptr(),
        plan.expert_TK.data_ptr(),
        out_TD.data_ptr(),
        dgate_TK.data_ptr(),
        link.done["collect"],
        n_tokens,
        own.shape[1],
        top_k,
        n_local,
        width // 8,
        waits,
    )
    blocks = max(1, min(_COLLECT_BLOCKS, -(-n_tokens // _COLLECT_WARPS)))
    with torch.cuda.device(link.device):
        _COLLECT[gates, next(ranks for ranks in (2, 4, 8) if link.world <= ranks)].launch(
            (blocks, 1, 1), 32 * _COLLECT_WARPS, 0, params, early=True
        )
    return out_TD, dgate_TK


def _await(link: Link, phase: int, part: int) -> None:
    with torch.cuda.device(link.device):
        _AWAIT.launch((1, 1, 1), 32, 0, _AwaitParams(link.params, phase, part), early=True)


def _return_params(
    link: Link, returns: Returns, y_RD: torch.Tensor, row_SK: torch.Tensor, count_W: torch.Tensor
) -> _ReturnParams:
    return _ReturnParams(
        link=link.params,
        y=y_RD.data_ptr(),
        row=row_SK.data_ptr(),
        count=count_W.data_ptr(),
        returned=_pointers([part[link.rank] for part in returns.y_WND]),
        done=link.done["return"],
        most_tokens=row_SK.shape[0] // link.world,
        top_k=row_SK.shape[1],
        row_pieces=y_RD.shape[1] // 8,
        n_rows=y_RD.shape[0],
        ends=1,
    )


def _launch_return(link: Link, kind: str, params: _ReturnParams, blocks: int) -> None:
    row_bytes = params.row_pieces * 16
    warps = _most_warps(_RETURN_WARPS, 2 * row_bytes)
    with torch.cuda.device(link.device):
        _RETURN[kind, warps].launch((blocks, 1, 1), 32 * warps, 2 * warps * row_bytes, params, early=True)


def _pointers(tensors: Sequence[torch.Tensor]) -> "ctypes.Array[ctypes.c_void_p]":
    return _Pointers(*(tensor.data_ptr() for tensor in tensors))


def _most_warps(choices: tuple[int, ...], bytes_a_warp: int) -> int:
    """As many warps as have room in a block's shared memory.

    Raises:
        ShapeError: not even one has.
    """
    for warps in choices:
        if warps * bytes_a_warp <= _SHARED_BYTES:
            return warps
    raise ShapeError(
        f"expected rows of which shared memory ({_SHARED_BYTES} B) holds those of one warp, found {bytes_a_warp} B: "
        "use a narrower model"
    )
