"""One pre-norm layer of a stack: attention, optional cross-attention, MLP, and what each needs while decoding.

x = x + dropout(attention(norm(x)));   [x = x + dropout(cross(norm(x), context));]   x = x + dropout(mlp(norm(x)))
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from core.attention.contract import State
from core.attention.layer import Attention
from core.attention.registry import nearest
from core.backbone.mlp import MLP, MLPS, MixMLP

CONTEXT = "context_"
"""What a block's state holds for cross-attention has names that start so."""
MIXED = "mlp_before"
"""What it holds for the convolution of its MLP."""


class Block(nn.Module):
    """One pre-norm layer: self-attention, optional cross-attention, MLP.

    Args:
        dim: C.   heads: number of heads.   attention: `{"variant": name, **options}`.
        cross: the same for cross-attention; None: no cross-attention.
        mlp_dim: hidden width of the MLP.   mlp: "gelu", or "mix" for one with a convolution, see `core.backbone.mlp`.
        dropout: on each branch before it is added.
        **layer: further arguments of the self-attention (`causal`, `positions`, `qk_norm`, `num_kv_heads`, `backend`).
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        attention: Mapping[str, Any],
        *,
        mlp_dim: int,
        mlp: str = "gelu",
        dropout: float = 0.0,
        cross: Mapping[str, Any] | None = None,
        **layer,
    ):
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads, **attention, **layer)
        self.attention._require("causal" if self.attention.causal else "bidirectional")  # one may only be able to cross
        self.cross_norm = self.cross = None
        if cross is not None:
            self.cross_norm = nn.LayerNorm(dim)
            shared = {key: layer[key] for key in ("qk_norm", "num_kv_heads", "backend") if key in layer}
            self.cross = Attention(dim, heads, **cross, **shared)
            self.cross._require("cross")
        self.mlp_norm = nn.LayerNorm(dim)
        if mlp not in MLPS:
            raise ValueError(f"unknown mlp {mlp!r}{nearest(mlp, MLPS)}; known: {', '.join(MLPS)}")
        causal = self.attention.causal
        self.mlp = MLP(dim, mlp_dim, dropout) if mlp == "gelu" else MixMLP(dim, mlp_dim, dropout, causal)
        self.drop = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        key_mask: Tensor | None = None,
        context_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        coordinates: Tensor | None = None,
        grid: tuple[int, int] | None = None,
        global_mask: Tensor | None = None,
    ) -> Tensor:
        """[B, L, C] -> [B, L, C]; context [B, M, C] for a block with cross-attention; the rest as in `Attention`."""
        if cu_seqlens is not None and isinstance(self.mlp, MixMLP):
            raise ValueError("mlp='mix' looks at neighbours, which in a pack may be another sequence's; use key_mask")
        where = {"key_mask": key_mask, "cu_seqlens": cu_seqlens, "coordinates": coordinates, "grid": grid}
        if "global" in self.attention.variant.can:
            where["global_mask"] = global_mask
        x = self._crossed(x + self.drop(self.attention(self.attention_norm(x), **where)), context, context_mask)
        return self._mixed(x, key_mask, grid)[0]

    def init_state(self, batch_size: int) -> State:
        """The decoding state before the first token."""
        state = self.attention.init_state(batch_size)
        return {**state, MIXED: self.mlp.init_state(batch_size)} if isinstance(self.mlp, MixMLP) else state

    def remember(self, context: Tensor, context_mask: Tensor | None = None) -> State:
        """What cross-attention needs of a context [B, M, C], to join the block's state."""
        if self.cross is None:
            raise ValueError("this block has no cross-attention to remember a context for")
        kept = self.cross.remember(context, key_mask=context_mask)
        return {f"{CONTEXT}{name}": tensor for name, tensor in kept.items()}

    def prefill(self, x: Tensor, state: State, context: Tensor | None = None, context_mask: Tensor | None = None):
        """Causal continuation of x [B, L, C] from `state`; gives (y, new state)."""
        kept = {name: tensor for name, tensor in state.items() if name.startswith(CONTEXT)}
        y, new = self.attention.prefill(
            self.attention_norm(x),
            {name: tensor for name, tensor in state.items() if name not in kept and name != MIXED},
        )
        x = self._crossed(x + self.drop(y), context, context_mask, kept)
        y, last = self._mixed(x, before=state.get(MIXED))
        return y, {**new, **kept, **({} if last is None else {MIXED: last})}

    def _mixed(self, x: Tensor, mask=None, grid=None, before: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """x with the MLP's branch, and what that keeps while decoding."""
        y = self.mlp_norm(x)
        y, last = self.mlp(y, mask, grid, before) if isinstance(self.mlp, MixMLP) else (self.mlp(y), None)
        return x + self.drop(y), last

    def _crossed(
        self, x: Tensor, context: Tensor | None, context_mask: Tensor | None, kept: State | None = None
    ) -> Tensor:
        if self.cross is not None and self.cross_norm is not None:
            if context is None and not kept:
                raise ValueError("this block has cross-attention and needs a context [B, M, C]")
            if context is not None and kept:
                raise ValueError("give the context to init_state or to each call, not both")
            y = self.cross_norm(x)
            if context is None:
                y = self.cross.recall(y, {name.removeprefix(CONTEXT): tensor for name, tensor in (kept or {}).items()})
            else:
                y = self.cross(y, context, key_mask=context_mask)
            x = x + self.drop(y)
        return x
