"""The ranks of a run: who is here, and what all of them compute together. `W` ranks, one process each."""

import os
import time
from collections import Counter
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from nmoe.rdep.errors import PeerTimeoutError, WorldError

_LAST_WORDS_S = 5.0


class World:
    """This rank's place among the ranks; made by `alone` or `join_world`.

    Every rank calls the same collectives in the same order, with tensors of the same shape and dtype on `device`.
    On a GPU they are queued on torch's current stream and may be captured in a CUDA graph. Sums are the same bits on
    every rank and in every run: on the CPU those of adding in rank order, on a GPU in NCCL's order, which is fixed at
    one number of ranks on one kind of machine. Of one rank alone, collectives are the identity and touch nothing.

    Attributes:
        rank: 0 to `size - 1`.
        size: W.
        device: where this rank's tensors are.
        store: keys and values that all ranks see; None alone.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        device: torch.device,
        store: dist.Store | None = None,
        timeout_s: float = 0.0,
    ) -> None:
        self.rank, self.size, self.device, self.store = rank, size, device, store
        self._timeout_s = timeout_s
        self._on_gpu = device.type == "cuda"
        self._shared: Counter[str] = Counter()

    def sum_(self, tensor: torch.Tensor) -> None:
        """Replaces a contiguous tensor, the same on every rank afterwards, by its sum over ranks.

        On the CPU this takes memory for W tensors: meant for figures, not for gradients (`scatter_sum`).

        Raises:
            WorldError: the tensor is not contiguous, or a rank is lost.
        """
        if self.size == 1:
            return
        _check_contiguous("sum_", tensor)
        if self._on_gpu:
            self._call("sum_", dist.all_reduce, tensor)
        else:
            all_W = tensor.new_empty((self.size, tensor.numel()))
            self._call("sum_", dist.all_gather_into_tensor, _bytes(all_W), _bytes(tensor))
            _sum_in_order(all_W, tensor.view(-1))

    def min_(self, tensor: torch.Tensor) -> None:
        """Replaces a contiguous tensor by its elementwise minimum over ranks.

        Raises:
            WorldError: as `sum_`.
        """
        if self.size > 1:
            _check_contiguous("min_", tensor)
            self._call("min_", dist.all_reduce, tensor, dist.ReduceOp.MIN)

    def scatter_sum(self, whole: torch.Tensor, piece: torch.Tensor) -> None:
        """Gives this rank its piece of the sum over ranks.

        Args:
            whole: W equal pieces, one after the other, contiguous; not changed, unless `piece` is part of it.
            piece: the sum over ranks of piece `rank`, contiguous; may be piece `rank` of `whole` itself.

        Raises:
            WorldError: the sizes or dtypes do not fit, or a rank is lost.
        """
        if self.size == 1:
            if piece.data_ptr() != whole.data_ptr():
                piece.copy_(whole.view(piece.shape))
            return
        _check_contiguous("scatter_sum", whole)
        _check_contiguous("scatter_sum", piece)
        if whole.numel() != self.size * piece.numel() or whole.dtype != piece.dtype:
            raise WorldError(
                f"expected a whole of {self.size} pieces of {piece.numel()} {piece.dtype} for scatter_sum, found "
                f"{whole.numel()} {whole.dtype}: pad the whole to a multiple of the ranks"
            )
        if self._on_gpu:
            self._call("scatter_sum", dist.reduce_scatter_tensor, piece.view(-1), whole.view(-1))
        else:
            pieces_W = whole.new_empty((self.size, piece.numel()))
            self._call("scatter_sum", dist.all_to_all_single, _bytes(pieces_W), _bytes(whole))
            _sum_in_order(pieces_W, piece.view(-1))

    def gather_(self, whole: torch.Tensor) -> None:
        """Fills a contiguous tensor of W equal pieces, of which every rank gives its own: piece `rank`.

        Raises:
            WorldError: the tensor is no whole number of pieces, or a rank is lost.
        """
        if self.size == 1:
            return
        _check_contiguous("gather_", whole)
        if whole.numel() % self.size:
            raise WorldError(
                f"expected {self.size} equal pieces for gather_, found {whole.numel()} elements: pad the whole to a "
                "multiple of the ranks"
            )
        if self._on_gpu:
            flat = whole.view(-1)
            self._call("gather_", dist.all_gather_into_tensor, flat, flat.view(self.size, -1)[self.rank])
        else:
            flat = _bytes(whole)
            # NCCL may gather in place; Gloo does not promise to.
            own = flat.view(self.size, -1)[self.rank].clone()
            self._call("gather_", dist.all_gather_into_tensor, flat, own)

    def barrier(self) -> None:
        """Returns once every rank is here, with all that its current stream held done.

        Raises:
            PeerTimeoutError: a rank did not come in time.
            WorldError: rank 0 is lost.
        """
        if self._on_gpu:
            torch.cuda.current_stream(self.device).synchronize()
        # Through the store, and not by a collective, so that a rank which does not come is known by its number.
        self.share("barrier", b"")

    def share(self, name: str, value: bytes, timeout_s: float | None = None) -> list[bytes]:
        """Every rank's value, by rank. For small things, in host memory, that are needed once.

        Args:
            name: what is shared, the same on all ranks; a name's second call meets the others' second, and so on.
            value: this rank's.
            timeout_s: how long to wait for the others; None: as long as the world does.

        Raises:
            PeerTimeoutError: a rank did not share its value in time.
            WorldError: rank 0 is lost, or the world was closed.
        """
        if self.size == 1:
            return [value]
        if self.store is None:
            raise WorldError(f"expected an open world to share '{name}', found a closed one: close it last")
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        deadline = time.monotonic() + timeout_s
        keys = [f"{name}/{self._shared[name]}/{rank}" for rank in range(self.size)]
        self._shared[name] += 1
        values: list[bytes] = []
        try:
            self.store.set(keys[self.rank], value)  # type: ignore[arg-type]  # it takes bytes as well as text
            for key in keys:
                self.store.wait([key], timedelta(seconds=max(deadline - time.monotonic(), 1e-3)))
                values.append(self.store.get(key))
        except dist.DistNetworkError as error:
            raise WorldError(
                f"expected rank 0, which holds the ranks' store, to be there for '{name}', found {error}: see what "
                "rank 0 said last"
            ) from error
        except dist.DistStoreError as error:
            raise PeerTimeoutError(len(values), name, timeout_s) from error
        return values

    def close(self) -> None:
        """Leaves the others. Once is enough, and twice does no harm.

        CUDA graphs that hold collectives must be gone before: NCCL waits for them.
        """
        store, self.store = self.store, None
        if store is None:
            return
        dist.destroy_process_group()
        # The store ends with rank 0, while others may still read from it: it leaves last, if they are alive.
        try:
            store.set(f"left/{self.rank}", "")
            if self.rank == 0:
                store.wait([f"left/{rank}" for rank in range(self.size)], timedelta(seconds=_LAST_WORDS_S))
        except dist.DistError:
            pass

    def _call(self, name: str, collective: Any, *arguments: Any, **options: Any) -> None:
        try:
            collective(*arguments, **options)
        except RuntimeError as error:
            raise WorldError(
                f"expected all {self.size} ranks in {name}, found {error}: see what the other ranks said last"
            ) from error


def alone(device: torch.device | str) -> World:
    """The world of one rank, which needs no process group."""
    return World(0, 1, torch.device(device))


def join_world(
    *,
    rank: int,
    size: int,
    address: str,
    port: int,
    device: torch.device | str,
    timeout_s: float,
    serve: bool = True,
) -> World:
    """Meets the other ranks: TCP for a store, then NCCL on GPUs or Gloo on CPUs. All ranks wait for one another.

    Makes torch's default process group; a process joins one world at a time. Makes `device` torch's current one.

    Args:
        rank: 0 to `size - 1`, another on each rank.
        size: W; 1 gives `alone(device)`.
        address: of rank 0's host.
        port: of rank 0's store.
        device: "cpu", or a GPU with its index, which no other rank has.
        timeout_s: how long a rank waits for the others, here and in every collective.
        serve: rank 0 holds the store; False where another process does at that address, as torchrun's agent may.

    Raises:
        PeerTimeoutError: a rank did not come in time.
        WorldError: there is no such rank or device, or nothing answers at the address.
    """
    device = torch.device(device)
    if not 0 <= rank < size:
        raise WorldError(f"expected a rank from 0 to {size - 1}, found {rank}: check RANK and WORLD_SIZE")
    if size == 1:
        return alone(device)
    _check_device(device)
    timeout = timedelta(seconds=timeout_s)
    try:
        store = dist.TCPStore(address, port, None, serve and rank == 0, timeout, wait_for_workers=False)
    except dist.DistError as error:
        role = "to open" if serve and rank == 0 else "to find"
        raise WorldError(
            f"expected rank {rank} {role} the ranks' store at {address}:{port} within {timeout_s:g} s, found {error}: "
            "start rank 0 too, and use a port that is free on its host"
        ) from error
    on_gpu = device.type == "cuda"
    world = World(rank, size, device, store, timeout_s)
    # Whoever is missing is named here; a process group that waits in vain does not tell.
    world.share("join", b"here")
    if on_gpu:
        # The order in which NVLink switches add is nowhere promised; whoever wants them sets the variable.
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
        torch.cuda.set_device(device)
    world._call(
        "the start of their process group",
        dist.init_process_group,
        "nccl" if on_gpu else "gloo",
        store=dist.PrefixStore("group", store),
        rank=rank,
        world_size=size,
        timeout=2 * timeout,  # whoever waits for a rank in an exchange says which: that comes first
        device_id=device if on_gpu else None,
    )
    _warm(world)
    return world


def _warm(world: World) -> None:
    """Runs each collective once: a CUDA graph can capture them only when their connections are there."""
    figures = torch.zeros(world.size, device=world.device)
    world.sum_(figures)
    world.min_(figures)
    world.scatter_sum(figures, figures[world.rank : world.rank + 1])
    world.gather_(figures)
    world.barrier()


def _sum_in_order(all_W: torch.Tensor, out: torch.Tensor) -> None:
    """out = all_W[0] + all_W[1] + …, added from left to right in out's dtype."""
    out.copy_(all_W[0])
    for other in all_W[1:]:
        out.add_(other)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """What Gloo moves, which knows few dtypes: the bytes of a contiguous tensor, uint8 (n,)."""
    return tensor.view(-1).view(torch.uint8)


def _check_device(device: torch.device) -> None:
    if device.type == "cpu":
        return
    n_gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    if device.index is None or not 0 <= device.index < n_gpus:
        raise WorldError(
            f"expected 'cpu' or one of the {n_gpus} GPUs by its index, found '{device}': give each rank on this host a "
            "GPU of its own, 'cuda:0' and on"
        )


def _check_contiguous(name: str, tensor: torch.Tensor) -> None:
    if not tensor.is_contiguous():
        raise WorldError(
            f"expected a contiguous tensor for {name}, found strides {tensor.stride()} of shape {tuple(tensor.shape)}: "
            "pass a contiguous one"
        )
