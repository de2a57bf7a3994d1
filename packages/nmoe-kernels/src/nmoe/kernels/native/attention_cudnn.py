"""Global causal attention by cuDNN, whose kernel is the fastest public one at MLA's head sizes 192 and 128; with the
same bits each time, gradients too.

PyTorch reaches the same kernels, but not their deterministic backward (2.11): hence cuDNN's own Python interface. The
deterministic backward holds, while it runs, the gradients of all scores in bf16: 2 B H S² bytes, 4 GiB at B 8, H 16,
S 4096 (seen with cuDNN 9.19).

Shapes: B batch, H heads, S sequence, d query-key width, v value width.
"""

import threading
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from nmoe.kernels.errors import KernelError, ShapeError
from torch.autograd.function import once_differentiable

_Layout = tuple[tuple[int, ...], tuple[int, ...]]
"""Shape and strides of a tensor."""


def global_attention(q_BHSd: torch.Tensor, k_BHSd: torch.Tensor, v_BHSv: torch.Tensor, *, scale: float) -> torch.Tensor:
    """Causal attention over whole sequences; see `nmoe.kernels.reference.attention.attention`.

    Args:
        q_BHSd: bf16 queries, dense in the last dimension, such as heads beside each other in (B, S, H, d); S > 1.
        k_BHSd: keys.
        v_BHSv: values.
        scale: factor on the scores before the softmax.

    Returns:
        (B, H, S, v), a view of (B, S, H, v).

    Raises:
        ShapeError: cuDNN has no kernel for these widths on this GPU.
        KernelError: cuDNN's interface is not installed.
    """
    if any(x.dtype != torch.bfloat16 or not x.is_cuda for x in (q_BHSd, k_BHSd, v_BHSv)):
        found = ", ".join(f"{x.dtype} on {x.device}" for x in (q_BHSd, k_BHSd, v_BHSv))
        raise ShapeError(
            f"expected torch.bfloat16 queries, keys and values on a CUDA device, found {found}: convert them, or set "
            "runtime.kernels = 'reference'"
        )
    out: torch.Tensor = _GlobalAttention.apply(q_BHSd, k_BHSd, v_BHSv, scale)
    return out


class _GlobalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        q, k, v = (_dense_heads(x) for x in (q, k, v))
        out, lse_BHS1 = _empty_heads(v), torch.empty(*q.shape[:3], 1, dtype=torch.float32, device=q.device)
        plan = _forward_plan(q.device, _layout(q), _layout(k), _layout(v), _layout(out), scale)
        plan.run(q, k, v, out, lse_BHS1)
        ctx.save_for_backward(q, k, v, out, lse_BHS1)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        q, k, v, out, lse_BHS1 = ctx.saved_tensors
        dout = _dense_heads(grads[0])
        dq, dk, dv = _empty_heads(q), _empty_heads(k), _empty_heads(v)
        layouts = tuple(_layout(x) for x in (q, k, v, out, dout, dq, dk, dv))
        _backward_plan(q.device, layouts, ctx.scale).run(q, k, v, out, dout, lse_BHS1, dq, dk, dv)
        return dq, dk, dv, None


def _dense_heads(x: torch.Tensor) -> torch.Tensor:
    """`x`, or a copy where its last dimension is not dense or a row is not at a multiple of 16 bytes."""
    aligned = x.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in x.stride()[:-1])
    return x if x.stride(-1) == 1 and aligned and 0 not in x.stride() else x.contiguous()


def _empty_heads(like_BHSx: torch.Tensor) -> torch.Tensor:
    """(B, H, S, x) as a view of (B, S, H, x): what the projections before and after attention read and write."""
    return torch.empty_like(like_BHSx.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


def _layout(x: torch.Tensor) -> _Layout:
    return tuple(x.shape), x.stride()


class _Plan(NamedTuple):
    """One of cuDNN's kernels, chosen and compiled for a set of layouts."""

    graph: Any
    workspace_bytes: int

    def run(self, *tensors: torch.Tensor) -> None:
        """Launches on the current stream, in or out of a CUDA graph; `tensors` in the order of the plan's uids."""
        device = tensors[0].device
        with torch.cuda.device(device):
            handle = _handle(device.index)
            _cudnn().set_stream(handle=handle, stream=torch.cuda.current_stream(device).cuda_stream)
            workspace = torch.empty(max(self.workspace_bytes, 1), dtype=torch.uint8, device=device)
            pointers = {uid: tensor.data_ptr() for uid, tensor in enumerate(tensors, start=1)}
            self.graph.execute(pointers, workspace.data_ptr(), handle=handle)


@lru_cache(maxsize=256)
def _forward_plan(device: torch.device, q: _Layout, k: _Layout, v: _Layout, out: _Layout, scale: float) -> _Plan:
    graph = _new_graph(device)
    given = [_describe(graph, uid, layout) for uid, layout in enumerate((q, k, v), start=1)]
    made = graph.sdpa(
        **dict(zip("qkv", given, strict=True)), attn_scale=scale, use_causal_mask=True, generate_stats=True
    )
    _set_outputs(made, (out, _lse_layout(q)), first_uid=4)
    made[1].set_data_type(_cudnn().data_type.FLOAT)
    return _finish(device, graph, f"q {q[0]}, v {v[0]}")


@lru_cache(maxsize=256)
def _backward_plan(device: torch.device, layouts: tuple[_Layout, ...], scale: float) -> _Plan:
    graph = _new_graph(device)
    q, _, v, _, _, *grads = layouts
    names = ("q", "k", "v", "o", "dO")
    given = {name: _describe(graph, uid, layouts[uid - 1]) for uid, name in enumerate(names, start=1)}
    given["stats"] = _describe(graph, 6, _lse_layout(q), _cudnn().data_type.FLOAT)
    made = graph.sdpa_backward(**given, attn_scale=scale, use_causal_mask=True, use_deterministic_algorithm=True)
    _set_outputs(made, grads, first_uid=7)
    return _finish(device, graph, f"q {q[0]}, v {v[0]}")


def _lse_layout(q: _Layout) -> _Layout:
    """Of the scores' logsumexp, dense (B, H, S, 1)."""
    batch, heads, length, _ = q[0]
    return (batch, heads, length, 1), (heads * length, length, 1, 1)


def _new_graph(device: torch.device) -> Any:
    cudnn = _cudnn()
    kinds = cudnn.data_type
    return cudnn.pygraph(
        io_data_type=kinds.BFLOAT16,
        intermediate_data_type=kinds.FLOAT,
        compute_data_type=kinds.FLOAT,
        handle=_handle(device.index),
    )


def _describe(graph: Any, uid: int, layout: _Layout, data_type: Any = None) -> Any:
    kind = _cudnn().data_type.BFLOAT16 if data_type is None else data_type
    return graph.tensor(dim=list(layout[0]), stride=list(layout[1]), data_type=kind, uid=uid)


def _set_outputs(made: Any, layouts: Any, first_uid: int) -> None:
    for uid, (tensor, (shape, strides)) in enumerate(zip(made, layouts, strict=True), start=first_uid):
        tensor.set_output(True).set_uid(uid).set_dim(list(shape)).set_stride(list(strides))


def _finish(device: torch.device, graph: Any, what: str) -> _Plan:
    cudnn = _cudnn()
    try:
        with torch.cuda.device(device):
            graph.validate()
            graph.build_operation_graph()
            graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
            graph.check_support()
            graph.build_plans()
    except (RuntimeError, cudnn.cudnnGraphNotSupportedError) as error:
        raise ShapeError(
            f"expected heads that cuDNN {cudnn.backend_version_string()} has a deterministic kernel for, found {what}: "
            f"choose widths of 64, 128, or 192 and 128, or set runtime.kernels = 'reference' ({error})"
        ) from error
    return _Plan(graph, graph.get_workspace_size())


_handles = threading.local()


def _handle(device: int) -> Any:
    """cuDNN's handle of this thread on the device, which must be the current one: no two threads may share it."""
    by_device: dict[int, Any] = _handles.__dict__.setdefault("by_device", {})
    if device not in by_device:
        by_device[device] = _cudnn().create_handle()
    return by_device[device]


@lru_cache(maxsize=1)
def _cudnn() -> Any:
    try:
        import cudnn
    except ImportError as error:
        raise KernelError(
            f"expected cuDNN's Python interface, found none ({error}): pip install 'nvidia-cudnn-frontend>=1.18,<1.23'"
            ", or set runtime.kernels = 'reference'"
        ) from error
    return cudnn
