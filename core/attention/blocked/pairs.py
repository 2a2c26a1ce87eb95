"""How operators are registered: the shapes for tracing, what is saved, where gradients go, and what is refused.

The same for the blocked forms and the kernels of one operation. Operators whose outputs or gradients are their own kind
say so in their own files, and are registered by `join`, or by `alone` where nothing flows back.

Autocast does not reach an operator: `core.attention.autocast` has narrowed q, k and v at the entrance, and what comes
wide after that is wide on purpose. A second derivative and torch.vmap are one clear error each.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from core.attention.contract import accumulator
from core.attention.feature_maps import feature_map as phi_named


def join(
    forward: Any, backward: Any, shapes: Callable, gradient_shapes: Callable, setup: Callable, gradients: Callable
) -> None:
    """Register `backward` as the gradient of `forward`.

    Args:
        shapes: empty outputs from the arguments of `forward`.   gradient_shapes: the same of `backward`.
        setup: (ctx, inputs, output), keeps what the backward needs.
        gradients: (ctx, *d outputs) -> d inputs, None where there is none.
    """
    alone(forward, shapes)
    alone(backward, gradient_shapes)
    forward.register_autograd(gradients, setup_context=setup)

    def once(ctx, *_):
        raise NotImplementedError(
            f"{forward._qualname} has no second derivative: backend='reference' has one, at quadratic cost"
        )

    backward.register_autograd(once)


def alone(operator: Any, shapes: Callable) -> None:
    """Register an operator without gradient: the shapes for tracing, and that it cannot be mapped over."""
    operator.register_fake(shapes)

    def whole(info, in_dims, *_):
        raise NotImplementedError(
            f"{operator._qualname} cannot run under torch.vmap: make the mapped dimension a part of the batch"
        )

    operator.register_vmap(whole)


def join_softmax(forward: Any, backward: Any, fixed: int, learned: int = 3) -> None:
    """Register `backward` as the gradient of `forward`, an attention with softmax's weights.

    Args:
        forward: (q, k, v, *fixed tensors, *options) -> (out [B, H, L, E], log_mass [B, H, L]).
        backward: (d_out, d_mass, q, k, v, out, log_mass, *fixed tensors, *options) -> (dq, dk, dv).
        fixed: tensors that get no gradient, masks and the like, which may be absent.
        learned: tensors that get one; the first is that of the queries, the last the values.
    """

    def shapes(q: Tensor, *given):
        v = given[learned - 2]
        return v.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=accumulator(q.dtype))

    def setup(ctx, inputs, output):
        ctx.options = inputs[learned + fixed :]
        ctx.save_for_backward(*inputs[:learned], *output, *inputs[learned : learned + fixed])

    def gradients(ctx, d_out, d_mass):
        grads = backward(d_out, d_mass, *ctx.saved_tensors, *ctx.options)
        return *grads, *([None] * (fixed + len(ctx.options)))

    join(forward, backward, shapes, lambda d_out, d_mass, *given: like(*given[:learned]), setup, gradients)


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
        return *like(q, k, v), torch.empty_like(end)

    join(forward, backward, shapes, like_inputs, setup, gradients)


def join_scan(forward: Any, backward: Any, kept: int = 0, packs: bool = False) -> None:
    """Register `backward` as the gradient of `forward`, a gated recurrence by a kernel, in float32.

    Args:
        forward: (q, k, v, *gates, state or None) -> (out [B, H, L, E], last state [B, K, F, E], *kept like v).
        backward: (d_out, d_end, q, k, v, *gates, state or None, last state, *kept) -> gradients of q, k, v, the gates
            and the first state.
        kept: outputs that only the backward wants.
        packs: both also take the offsets of a pack or None, and its longest; then the states hold nothing.
    """
    tail = 2 if packs else 0

    def shapes(q: Tensor, k: Tensor, v: Tensor, *given):
        out = q.new_empty(*q.shape[:3], v.shape[3], dtype=torch.float32)
        end = q.new_empty(*k.shape[:2], k.shape[3], v.shape[3], dtype=torch.float32)
        if packs and len(given) > 3 and given[-2] is not None:
            end = end.new_empty(0)
        return out, end, *like(*[v] * kept)

    def setup(ctx, inputs, output):
        ctx.mark_non_differentiable(*output[2:])
        inputs, ctx.pack = inputs[: len(inputs) - tail], inputs[len(inputs) - tail :]
        ctx.started = inputs[-1] is not None
        ctx.save_for_backward(*inputs, *output[1:])

    def gradients(ctx, d_out, d_end, *_):
        *grads, d_state = backward(d_out, d_end, *ctx.saved_tensors, *ctx.pack)
        return *grads, d_state if ctx.started else None, *([None] * tail)

    def like_inputs(d_out, d_end, *tensors):
        tensors = tensors[: len(tensors) - tail] if packs and not isinstance(tensors[-1], Tensor) else tensors
        *inputs, _, end = tensors[: len(tensors) - kept]
        return *like(*inputs), torch.empty_like(end)

    join(forward, backward, shapes, like_inputs, setup, gradients)


def like(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Empty tensors of these shapes and dtypes, as an operator writes its gradients: contiguous."""
    return tuple(x.new_empty(x.shape) for x in tensors)
