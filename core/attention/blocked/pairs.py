"""How a pair of operators, forward and backward, becomes one differentiable function.

The same for the blocked forms and the kernels of one operation: the shapes for tracing, what is saved, and where the
gradients go. Operations whose outputs or gradients are their own kind say so in their own files.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from core.attention.contract import accumulator
from core.attention.feature_maps import feature_map as phi_named


def join_softmax(forward: Any, backward: Any, fixed: int) -> None:
    """Register `backward` as the gradient of `forward`, an attention with softmax's weights.

    Args:
        forward: (q, k, v, *fixed tensors, *options) -> (out [B, H, L, E], log_mass [B, H, L]).
        backward: (d_out, d_mass, q, k, v, out, log_mass, *fixed tensors, *options) -> (dq, dk, dv).
        fixed: tensors that get no gradient, masks and the like, which may be absent.
    """

    def shapes(q: Tensor, k: Tensor, v: Tensor, *given):
        return v.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=accumulator(q.dtype))

    def setup(ctx, inputs, output):
        q, k, v, *given = inputs
        ctx.options = given[fixed:]
        ctx.save_for_backward(q, k, v, *output, *given[:fixed])

    def gradients(ctx, d_out, d_mass):
        grads = backward(d_out, d_mass, *ctx.saved_tensors, *ctx.options)
        return *grads, *([None] * (fixed + len(ctx.options)))

    _join(forward, backward, shapes, lambda d_out, d_mass, q, k, v, *_: _like(q, k, v), setup, gradients)


def join_sums(forward: Any, backward: Any) -> None:
    """Register `backward` as the gradient of `forward`, linear attention by running sums, with an initial state.

    Args:
        forward: (q, k, v, key_mask, decay, state, count, feature_map, *options) -> (out [B, H, L, E], log_mass and
            denominator [B, H, L], last state [B, K, F, E + 1]).
        backward: (d_out, d_mass, d_state, q, k, v, out, denominator, last state, key_mask, decay, state, count,
            feature_map, *options) -> (dq, dk, dv, d state).
    """

    def shapes(q: Tensor, k: Tensor, v: Tensor, key_mask, decay, state, count, feature_map, *options):
        acc, width = accumulator(q.dtype), phi_named(feature_map).width(q.shape[3])
        rows = q.new_empty(q.shape[:3], dtype=acc)
        end = q.new_empty(*k.shape[:2], width, v.shape[3] + 1, dtype=acc)
        return v.new_empty(*q.shape[:3], v.shape[3]), rows, torch.empty_like(rows), end

    def setup(ctx, inputs, output):
        q, k, v, key_mask, decay, state, count, *ctx.options = inputs
        out, _, den, end = output
        ctx.mark_non_differentiable(den)
        ctx.save_for_backward(q, k, v, out, den, end, key_mask, decay, state, count)

    def gradients(ctx, d_out, d_mass, _d_den, d_state):
        saved = ctx.saved_tensors  # read once: gradient checkpointing hands out each tensor a single time
        dq, dk, dv, ds = backward(d_out, d_mass, d_state, *saved, *ctx.options)
        started = saved[8] is not None
        return dq, dk, dv, None, None, ds if started else None, *([None] * (1 + len(ctx.options)))

    def like_inputs(d_out, d_mass, d_state, q, k, v, out, den, end, *_):
        return *_like(q, k, v), torch.empty_like(end)

    _join(forward, backward, shapes, like_inputs, setup, gradients)


def join_scan(forward: Any, backward: Any, kept: int = 0) -> None:
    """Register `backward` as the gradient of `forward`, a gated recurrence by a kernel, in float32.

    Args:
        forward: (q, k, v, *gates, state or None) -> (out [B, H, L, E], last state [B, K, F, E], *kept like v).
        backward: (d_out, d_end, q, k, v, *gates, state or None, last state, *kept) -> gradients of q, k, v, the gates
            and the first state.
        kept: outputs that only the backward wants.
    """

    def shapes(q: Tensor, k: Tensor, v: Tensor, *_):
        out = q.new_empty(*q.shape[:3], v.shape[3], dtype=torch.float32)
        end = q.new_empty(*k.shape[:2], k.shape[3], v.shape[3], dtype=torch.float32)
        return out, end, *_like(*[v] * kept)

    def setup(ctx, inputs, output):
        ctx.mark_non_differentiable(*output[2:])
        ctx.started = inputs[-1] is not None
        ctx.save_for_backward(*inputs, *output[1:])

    def gradients(ctx, d_out, d_end, *_):
        *grads, d_state = backward(d_out, d_end, *ctx.saved_tensors)
        return *grads, d_state if ctx.started else None

    def like_inputs(d_out, d_end, *tensors):
        *inputs, _, end = tensors[: len(tensors) - kept]
        return *_like(*inputs), torch.empty_like(end)

    _join(forward, backward, shapes, like_inputs, setup, gradients)


def _like(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in tensors)


def _join(forward, backward, shapes: Callable, gradient_shapes: Callable, setup: Callable, gradients: Callable):
    forward.register_fake(shapes)
    backward.register_fake(gradient_shapes)
    forward.register_autograd(gradients, setup_context=setup)
