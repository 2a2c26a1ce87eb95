"""Stacks of pre-norm blocks around `Attention`: an encoder (bidirectional or causal), a decoder with cross-attention.

Which attention stands in which layer is a word, see `core.layout`.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from core.attention.contract import Cost, State, Variant
from core.attention.positions import LearnedPositions, sinusoidal
from core.attention.registry import available, nearest, variant_class
from core.backbone.block import Block
from core.backbone.mlp import MixMLP
from core.layout import expand_layout

INPUT_POSITIONS = ("sinusoidal", "learned")
POSITIONS = (*INPUT_POSITIONS, "rope", "rope2d", "alibi")


class _Stack(nn.Module):
    """What encoder and decoder share: input positions, blocks, final norm, recomputation, cost."""

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        attention: Mapping[str, Any],
        *,
        layout: str | None = None,
        causal: bool = False,
        positions: str | None = None,
        mlp_dim: int | None = None,
        mlp: str = "gelu",
        dropout: float = 0.0,
        qk_norm: bool = False,
        checkpoint: bool = False,
        num_kv_heads: int | None = None,
        max_length: int | None = None,
        cross: Mapping[str, Any] | None = None,
        backend: str = "auto",
    ):
        super().__init__()
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        if positions is not None and positions not in POSITIONS:
            raise ValueError(
                f"unknown positions {positions!r}{nearest(positions, POSITIONS)}; known: None, {', '.join(POSITIONS)}"
            )
        if positions == "learned" and max_length is None:
            raise ValueError("positions='learned' needs max_length, the length of the table")
        self.dim, self.checkpoint, self.causal, self.positions = dim, checkpoint, causal, positions
        self.layers = expand_layout(attention, layout, depth)
        inside = None if positions in INPUT_POSITIONS else positions
        self.blocks = nn.ModuleList(
            Block(
                dim,
                heads,
                chosen,
                mlp_dim=mlp_dim or 4 * dim,
                mlp=mlp,
                dropout=dropout,
                cross=cross,
                causal=causal,
                positions=inside,
                qk_norm=qk_norm,
                num_kv_heads=num_kv_heads,
                backend=backend,
            )
            for chosen in self.layers
        )
        _tie([block.attention.variant for block in self])
        _tie([block.cross.variant for block in self if block.cross is not None])
        self.table = LearnedPositions(max_length, dim) if positions == "learned" and max_length is not None else None
        self.drop = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(dim)

    def __iter__(self) -> Iterator[Block]:
        yield from self.blocks  # type: ignore[misc]  (a ModuleList does not know what it holds)

    def cost(self, batch: int, length: int, context: int | None = None) -> Cost:
        """Cost of one forward pass over [batch, length] (and a context of that length), all layers."""
        total = Cost(parameters=sum(p.numel() for p in self.parameters()))
        for block in self:
            parts = [block.attention.cost(batch, length)]
            if block.cross is not None:
                parts.append(block.cross.cost(batch, length, length if context is None else context))
            parts.append(Cost(flops=batch * block.mlp.flops(length)))
            if isinstance(block.mlp, MixMLP) and parts[0].state_bytes:
                parts.append(Cost(state_bytes=batch * block.mlp.init_state(1).nbytes))
            total = sum((Cost(p.flops, p.bytes_moved, p.state_bytes) for p in parts), total)
        return total

    def init_state(self, batch_size: int) -> list[State]:
        """One decoding state per layer."""
        return [block.init_state(batch_size) for block in self]

    def prefill(
        self, x: Tensor, states: list[State], context: Tensor | None = None, context_mask: Tensor | None = None
    ) -> tuple[Tensor, list[State]]:
        """Read x [B, L, C] after what the states hold; any split gives what one forward over the whole gives."""
        start = states[0]["position"][:, None]
        x = self._place(x, None, None, start)
        new = []
        for block, state in zip(self, states):
            x, state = block.prefill(x, state, context, context_mask)
            new.append(state)
        return self.norm(x), new

    def step(self, x: Tensor, states: list[State], context: Tensor | None = None, context_mask: Tensor | None = None):
        """One token, x [B, C] -> (y [B, C], new states)."""
        y, states = self.prefill(x.unsqueeze(1), states, context, context_mask)
        return y.squeeze(1), states

    def _place(self, x, key_mask, cu_seqlens, start=None) -> Tensor:
        """Add the input positions; they restart in a pack and do not count padding."""
        if self.positions not in INPUT_POSITIONS:
            return x
        at = torch.arange(x.shape[1], device=x.device)
        if start is not None:
            at = at + start
        elif cu_seqlens is not None:
            starts = cu_seqlens.to(at.device)
            at = at - starts[torch.searchsorted(starts, at, right=True) - 1]
        elif key_mask is not None:
            at = (key_mask.cumsum(-1) - 1).clamp(min=0)
        if self.table is None:
            return self.drop(x + sinusoidal(at, self.dim).to(x.dtype))
        known = self.table.table.shape[0]
        plain = start is None and cu_seqlens is None and key_mask is None
        if plain and x.shape[1] > known:
            return self.drop(x + self.table(x.shape[1]))
        last = x.shape[1] + (0 if start is None else max(start.flatten().tolist(), default=0))
        if last > known and start is None:  # the longest sequence counts, not the padding or the pack around it
            last = int(at.max()) + 1
        if last > known:
            raise ValueError(
                f"learned positions reach {known}, this input needs {last}; build with a larger max_length "
                f"(only plain batches, without mask, pack or state, are resampled)"
            )
        return self.drop(x + self.table.table[at])

    def _run(self, x: Tensor, *args, **kwargs) -> Tensor:
        for block in self:
            if self.checkpoint and self.training and torch.is_grad_enabled():
                again = {} if torch.compiler.is_compiling() else {"context_fn": partial(_as_before, block)}
                x = recompute(block, x, *args, use_reentrant=False, **again, **kwargs)
            else:
                x = block(x, *args, **kwargs)
        return self.norm(x)


def _tie(variants: list[Variant]) -> None:
    """Make one parameter of those that variants of the same name call `tied`."""
    first: dict[tuple[str, str], nn.Parameter] = {}
    for variant in variants:
        for name in variant.tied:
            own = getattr(variant, name)
            shared = first.setdefault((variant.name, name), own)
            if own.shape != shared.shape:
                raise ValueError(
                    f"layers of {variant.name!r} share {name!r} and must agree on its shape, "
                    f"got {list(shared.shape)} and {list(own.shape)}"
                )
            setattr(variant, name, shared)


def _as_before(block: nn.Module) -> tuple[AbstractContextManager, AbstractContextManager]:
    """Contexts of a pass and of its recomputation, which finds what variants call `moving` as the pass did.

    Buffers are exchanged, not overwritten, because the backward pass may still need those of either pass.
    """
    places = [(part, name) for part in block.modules() if isinstance(part, Variant) for name in part.moving]
    found: list[Any] = []

    def copied(x):
        return x.clone() if isinstance(x, Tensor) else x

    @contextmanager
    def first():
        found.extend(copied(getattr(part, name)) for part, name in places)
        yield

    @contextmanager
    def second():
        latest = [getattr(part, name) for part, name in places]
        for (part, name), x in zip(places, found):
            setattr(part, name, copied(x))
        try:
            yield
        finally:
            for (part, name), x in zip(places, latest):
                setattr(part, name, x)

    return first(), second()


class Encoder(_Stack):
    """A stack of self-attention blocks, [B, L, C] -> [B, L, C], final norm included.

    Args:
        dim: C.   depth: number of blocks.   heads: heads per block, dividing dim.
        attention: `{"variant": name, **options}` for all layers, or one such per layout letter.
        layout: a word of letters repeated over the depth, see `core.layout`; None: the same attention everywhere.
        causal: a position sees its past only; then `init_state`, `prefill` and `step` decode.
        positions: None, "sinusoidal", "learned" (added to the input), "rope", "rope2d", "alibi" (inside attention).
        mlp_dim: hidden width of the MLP, default 4 dim.
        mlp: "gelu", or "mix" for one that also mixes neighbours, see `core.backbone.mlp`; not for packs.
        dropout: on every branch and on the positioned input.
        qk_norm: RMS-normalise queries and keys.
        checkpoint: recompute each block in the backward pass: memory of one block instead of `depth`.
        num_kv_heads: key heads, dividing heads.   max_length: size of the learned position table.
        backend: attention backend, "auto" chooses.

    Raises:
        ValueError: anything the layout, the variant or the head count refuses.
    """

    def forward(
        self,
        x: Tensor,
        *,
        key_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        coordinates: Tensor | None = None,
        grid: tuple[int, int] | None = None,
        global_mask: Tensor | None = None,
    ) -> Tensor:
        """Encode x [B, L, C].

        key_mask bool [B, L], True where a token is real; cu_seqlens [N + 1] for packs; grid (rows, columns) of an image
        whose tokens are the last of x; global_mask bool [B, L] for the layers that can "global", one at least.
        """
        if global_mask is not None and not any("global" in block.attention.variant.can for block in self):
            able = [name for name in available() if "global" in variant_class(name).can]
            raise ValueError(f"global_mask: no layer here takes global tokens; {', '.join(able)} does")
        x = self._place(x, key_mask, cu_seqlens)
        where = {"key_mask": key_mask, "cu_seqlens": cu_seqlens, "coordinates": coordinates, "grid": grid}
        return self._run(x, global_mask=global_mask, **where)


class Decoder(_Stack):
    """A causal stack whose blocks also attend to an encoder's output.

    Args:
        cross: attention of the cross-attention, `{"variant": name, **options}`; default softmax.
        Everything else as in `Encoder`.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        attention: Mapping[str, Any],
        *,
        cross: Mapping[str, Any] | None = None,
        **stack: Any,
    ):
        cross = {"variant": "softmax"} if cross is None else cross
        super().__init__(dim, depth, heads, attention, causal=True, cross=cross, **stack)

    def forward(
        self, x: Tensor, context: Tensor, *, key_mask: Tensor | None = None, context_mask: Tensor | None = None
    ) -> Tensor:
        """Decode x [B, L, C] given context [B, M, C]; masks are True where a token is real."""
        return self._run(self._place(x, key_mask, None), context, key_mask=key_mask, context_mask=context_mask)

    def init_state(
        self, batch_size: int, context: Tensor | None = None, context_mask: Tensor | None = None
    ) -> list[State]:
        """One decoding state per layer.

        Args:
            batch_size: B.
            context: [B, M, C], read once here so that `prefill` and `step` need it no more; with linear self- and
                cross-attention every step then costs the same, whatever M and the position. None: it is given to each
                call, which projects it anew.
            context_mask: bool [B, M], True where a token is real.
        """
        states = super().init_state(batch_size)
        if context is None:
            return states
        return [{**state, **block.remember(context, context_mask)} for block, state in zip(self, states)]
