"""Causal attention's backward on Hopper for wide heads, of more than 64 columns: five products.

The queries' gradient would be a sum over blocks of keys, in the order in which they come to it. So the scores'
gradients are kept, of some heads at a time: one kernel makes them and the gradients of keys and values, and the next
multiplies them by the keys. That is 4 bytes, written and read, beside over a thousand FLOPs of a pair of query and key.

Shapes: B batch, H heads, S positions, d and v columns of keys and values.
"""

import torch
from nmoe.kernels.native.attention_dkdv_cuda import KEYS, dkdv, workspace_shape
from nmoe.kernels.native.attention_dq_cuda import dq
from nmoe.kernels.native.attention_problem_cuda import Gradients, Problem

WORKSPACE_BYTES = 288 << 20
"""At most: half and twice as much were within 3% on an H200, but for fewer than some 200 blocks of keys a launch."""
_LEAST_BLOCKS = 240
"""Of keys, in all heads of a launch: fewer, of very different lengths where there is no window, leave multiprocessors
idle."""


def heads_at_once(n_heads: int, length: int, window: int) -> int:
    """Heads whose scores' gradients are kept at a time, about as many in each launch; 0: too few for these kernels.
    Without a window, or with one that is near as long, and with six heads or more in all, there are some up to 8448
    positions."""
    rows, columns = workspace_shape(length, window)
    most = WORKSPACE_BYTES // (2 * rows * columns)
    if most == 0 or (n_heads > most and most * -(-length // KEYS) < _LEAST_BLOCKS):
        return 0
    return -(-n_heads // -(-n_heads // most))


def gradients(problem: Problem, grads: Gradients, counter: torch.Tensor) -> None:
    """As `attention_narrow_cuda.gradients`, of what `heads_at_once` has room for."""
    batch, heads, length, _ = problem.q_BHSd.shape
    n_heads = batch * heads
    at_once = heads_at_once(n_heads, length, problem.window)
    dscore = problem.q_BHSd.new_empty(at_once, *workspace_shape(length, problem.window))
    for first in range(0, n_heads, at_once):
        some = dscore[: min(at_once, n_heads - first)]
        dkdv(problem, grads, some, first)
        dq(problem, grads, some, first, counter)
