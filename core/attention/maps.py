r"""Rows of the attention matrix of every mechanism, also of those that never form one.

Whatever a mechanism computes, row i of its matrix is how output i answers to the values:

    A_ij = mean over e of d o_(i, e) / d v_(j, e)

For softmax these are its weights; for linear, windowed, gated and hybrid attention, the weights that it stands for,
without an L x M tensor. Where a mechanism is not linear in v (a norm on the output, a delta rule's own correction)
the row is its linearisation at this input, and need not sum to one. What a mechanism reads of its layer's input by
projections of its own (global tokens of `longformer`) is not part of it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from core.attention.contract import Attended, Variant


def attention_rows(model: nn.Module, run: Callable[[], Any], queries: Sequence[int]) -> dict[str, Tensor]:
    """Rows of the attention matrix of all mechanisms inside a model, while it runs once.

    Args:
        model: anything that holds `Attention` layers; it should be in evaluation mode.
        run: a forward pass of the model, called once with hooks in place; batches without packs.
        queries: positions i, from 0; negative ones count from the end.

    Returns:
        name of the mechanism in the model ("encoder.3.attention.variant") -> [B, H, len(queries), M] in float32,
        on the device of the model. A mechanism that is called several times (a decoder, step by step) keeps its last.

    Raises:
        ValueError: the model has no mechanism of the core, or a query lies outside of its length.

    Cost:
        One backward pass of the mechanism alone per query and member of a head group.
    """
    variants = {name: part for name, part in model.named_modules() if isinstance(part, Variant)}
    outer = [name for name in variants if not any(name.startswith(f"{other}.") for other in variants if other != name)]
    if not outer:
        raise ValueError(f"{type(model).__name__} holds no attention of the core, so there are no rows to show")
    rows: dict[str, Tensor] = {}
    handles = []
    try:
        for name in outer:
            handles += _watch(variants[name], name, list(queries), rows)
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return rows


def _watch(variant: Variant, name: str, queries: list[int], rows: dict[str, Tensor]) -> list[Any]:
    """Hooks that replace the values by a leaf of the graph, and ask the output for its derivatives."""
    leaves: list[Tensor] = []
    modes: list[Any] = []

    def before(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        q, k, v = args[:3]
        leaf = v.detach().requires_grad_()
        leaves.append(leaf)
        modes.append(torch.enable_grad())
        modes[-1].__enter__()
        return (q.detach(), k.detach(), leaf, *args[3:]), kwargs

    def after(_: nn.Module, args: tuple, attended: Attended) -> Attended:
        leaf = leaves.pop()
        try:
            rows[name] = _rows(attended.out, leaf, queries)
        finally:
            modes.pop().__exit__(None, None, None)
        mass = attended.log_mass
        return Attended(attended.out.detach(), None if mass is None else mass.detach())

    return [
        variant.register_forward_pre_hook(before, with_kwargs=True),
        variant.register_forward_hook(after),
    ]


def _rows(out: Tensor, values: Tensor, queries: list[int]) -> Tensor:
    """out [B, H, L, E] and the leaf values [B, K, M, E] it came from -> [B, H, Q, M]."""
    heads, length = out.shape[1:3]
    outside = [query for query in queries if not -length <= query < length]
    if outside:
        raise ValueError(f"query {outside[0]} lies outside of a sequence of {length} positions")
    members = heads // values.shape[1]
    found = []
    for query in queries:
        # Heads of one group share their values, so they take turns; groups are asked at once.
        each = []
        for member in range(members):
            asked = out[:, member::members, query].sum()
            (gradient,) = torch.autograd.grad(asked, values, retain_graph=True, allow_unused=True)
            each.append(torch.zeros_like(values) if gradient is None else gradient)
        found.append(torch.stack(each, 2).flatten(1, 2).float().mean(-1))
    return torch.stack(found, 2)
