"""`Attention`: projections, heads, positions and QK-norm around any variant.

Every weight outside the variant is the same whichever variant is inside, so swapping it changes one thing.
"""

import torch
from torch import Tensor, nn

from core.attention.backends import check_backend
from core.attention.contract import Attended, Cost, Heads, Inputs, State
from core.attention.convolution import ShortConvolution
from core.attention.packing import Pack, attend_packed, pack_of
from core.attention.positions import Rotation, alibi_slopes
from core.attention.registry import available, build, variant_class

POSITIONS = ("rope", "rope2d", "alibi")


class Attention(nn.Module):
    """Multi-head attention, [B, L, C] -> [B, L, C], with any mechanism of `available()`.

    Args:
        dim: C, width of input and output.
        num_heads: H, dividing dim; the head width is dim // num_heads.
        variant: name of the mechanism.
        num_kv_heads: K, dividing num_heads; fewer key heads make smaller states. None: num_heads.
        causal: a position sees itself and its past only.
        positions: None, "rope", "rope2d" or "alibi", inside the mechanism. Sinusoidal and learned positions belong to
            the input, see `core.backbone`.
        qk_norm: RMS-normalise queries and keys per head.
        dropout: on the attention weights while training; only for variants that have weights.
        bias: whether projections have one.
        short_conv: taps of a depth-wise convolution on q, k and v (see `core.attention.convolution`); 0: none.
        backend: "auto" or the implementation to insist on.
        **options: the variant's own; `registry.entry(variant).options` lists them.

    Raises:
        ValueError: unknown variant, option or position, heads that do not divide the width, or something the variant
            cannot do; the text names what is valid.

    Example:
        >>> layer = Attention(64, 4, "hybrid", window=8, causal=True)
        >>> layer(torch.zeros(2, 100, 64)).shape
        torch.Size([2, 100, 64])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        variant: str = "softmax",
        *,
        num_kv_heads: int | None = None,
        causal: bool = False,
        positions: str | None = None,
        qk_norm: bool = False,
        dropout: float = 0.0,
        bias: bool = True,
        short_conv: int = 0,
        backend: str = "auto",
        **options,
    ):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            divisors = [n for n in range(1, dim + 1) if dim % n == 0]
            raise ValueError(f"num_heads must divide dim: {num_heads} does not divide {dim}; valid: {divisors}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        if positions is not None and positions not in POSITIONS:
            from core.attention.registry import nearest

            raise ValueError(
                f"unknown positions {positions!r}{nearest(positions, POSITIONS)}; known: None, {', '.join(POSITIONS)}"
            )
        check_backend(backend)
        self.dim, self.num_heads, self.causal = dim, num_heads, causal
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.positions, self.dropout, self.backend = positions, dropout, backend
        width = dim // num_heads
        self.variant = build(variant, Heads(num_heads, self.num_kv_heads, width, width, dim), **options)
        if causal or "cross" not in self.variant.can:
            self._require("causal" if causal else "bidirectional")
        if dropout:
            self._require("dropout")
        if positions is not None and positions.removesuffix("2d") not in self.variant.positions:
            able = [name for name in available() if positions.removesuffix("2d") in variant_class(name).positions]
            raise ValueError(f"attention {variant!r} does not compose with {positions!r}; {', '.join(able)} do")

        planes = {"rope": 1, "rope2d": 2}.get(positions or "", 0)
        turned = getattr(getattr(self.variant, "project", None), "turned", width)
        for size in {width, turned}:
            if planes and size % (2 * planes):
                raise ValueError(f"positions={positions!r} needs head widths divisible by {2 * planes}, got {size}")

        self.query = nn.Linear(dim, num_heads * width, bias=bias)
        self.key = nn.Linear(dim, self.num_kv_heads * width, bias=bias)
        self.value = nn.Linear(dim, self.num_kv_heads * width, bias=bias)
        self.output = nn.Linear(num_heads * width, dim, bias=bias)
        self.query_norm = nn.RMSNorm(width) if qk_norm else None
        self.key_norm = nn.RMSNorm(width) if qk_norm else None
        if isinstance(short_conv, bool) or not isinstance(short_conv, int) or short_conv < 0 or short_conv == 1:
            raise ValueError(f"short_conv is a number of taps, 0 (none) or at least 2, got {short_conv!r}")
        self.short_conv, self.convolutions = short_conv, None
        if short_conv:
            sizes = {"query": num_heads, "key": self.num_kv_heads, "value": self.num_kv_heads}
            self.convolutions = nn.ModuleDict(
                {name: ShortConvolution(heads, width, short_conv, causal) for name, heads in sizes.items()}
            )
        slopes = alibi_slopes(num_heads) if positions == "alibi" else None
        self.register_buffer("slopes", slopes, persistent=False)
        for layer in (self.query, self.key, self.value, self.output):
            nn.init.xavier_uniform_(layer.weight)
            if bias:
                nn.init.zeros_(layer.bias)
        for name, part in self.named_modules():
            if name in self.variant.unread:
                part.requires_grad_(False)  # data-parallel training would wait for its gradient

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        key_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cu_seqlens_context: Tensor | None = None,
        coordinates: Tensor | None = None,
        global_mask: Tensor | None = None,
        grid: tuple[int, int] | None = None,
    ) -> Tensor:
        """Attend to x itself, or to `context`.

        Args:
            x: [B, L, C].
            context: [B, M, C] for cross-attention; None: x.
            key_mask: bool [B, M], True where a key is real.
            cu_seqlens: [N + 1] offsets of a pack, x being [1, T, C]; excludes key_mask. Read on the host, but
                for variants whose kernels read packs by themselves: they do not wait for offsets on a device.
            cu_seqlens_context: the same for `context`.
            coordinates: where each token stands, for rotary positions: [L] or [B, L], with "rope2d" [..., L, 2] rows
                and columns. Default 0, 1, 2, ...; only differences matter.
            global_mask: bool [B, L], True for tokens that all see and that see all; for variants that can "global".
            grid: (rows, columns) of the image whose tokens are the last rows * columns of x; ignored by variants
                that cannot "grid", to which an image is a line.

        Returns:
            [B, L, C].

        Raises:
            ValueError: shapes that do not fit, a mask together with a pack, positions in cross-attention.
        """
        self._check(x, "x")
        if context is not None:
            context = self._real(context, key_mask)
        else:
            self._require("causal" if self.causal else "bidirectional")
        if global_mask is not None:
            self._require("global")
            if context is not None or global_mask.dtype != torch.bool or global_mask.shape != x.shape[:2]:
                raise ValueError(
                    f"global_mask must be bool {list(x.shape[:2])} and goes with self-attention, "
                    f"got {global_mask.dtype} {list(global_mask.shape)}"
                )
        if grid is not None and (cu_seqlens is not None or min(grid) < 1 or not 0 < grid[0] * grid[1] <= x.shape[1]):
            raise ValueError(f"grid={grid} needs that many tokens at the end of every sequence, got x {list(x.shape)}")
        if cu_seqlens is not None and key_mask is not None:
            raise ValueError("give key_mask or cu_seqlens, not both: a pack has no padding")
        if (cu_seqlens_context is not None) != (cu_seqlens is not None and context is not None):
            raise ValueError("cu_seqlens_context goes with cu_seqlens and a context, all three or none")
        q, k, v = self._project(x, x if context is None else context)
        self._check_coordinates(coordinates, x)
        if coordinates is None and self.positions == "rope":
            coordinates = torch.arange(x.shape[1], device=x.device)

        if cu_seqlens is None:
            return self._merge_heads(self._attend(q, k, v, key_mask, coordinates, Inputs(x, grid, global_mask)).out)

        if self.convolutions is None and global_mask is None and self.variant.reads_packs(q, v, backend=self.backend):
            pack = pack_of(q, k, cu_seqlens, cu_seqlens_context)
            return self._merge_heads(self._attend(q, k, v, None, coordinates, Inputs(x), pack=pack).out)

        def attend(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor, rows: Tensor) -> Attended:
            at = None if coordinates is None else _at(coordinates, rows, self.positions == "rope2d")
            marked = None if global_mask is None else global_mask[0][rows] & key_mask
            return self._attend(q, k, v, key_mask, at, Inputs(x[0][rows], None, marked))

        exact = self.variant.anchor == "length"
        return self._merge_heads(attend_packed(attend, q, k, v, cu_seqlens, cu_seqlens_context, exact=exact).out)

    def init_state(self, batch_size: int) -> State:
        """The decoding state before the first token.

        Raises:
            ValueError: the layer is not causal, or the variant has no state.
        """
        if not self.causal:
            raise ValueError("a decoding state needs causal=True")
        self._require("recurrent")
        weight = self.value.weight
        placed = {"device": weight.device, "dtype": weight.dtype}
        state = self.variant.init_state(batch_size, positions=self.positions, **placed)
        for name, size in self._reaches().items():
            state[name] = torch.zeros(batch_size, *size, **placed)
        return {**state, "position": torch.zeros(batch_size, dtype=torch.int64, device=weight.device)}

    def prefill(self, x: Tensor, state: State, *, key_mask: Tensor | None = None) -> tuple[Tensor, State]:
        """Read x [B, L, C] after what `state` holds; gives (y [B, L, C], new state).

        Any split of a sequence over calls gives what one forward over the whole gives. The old state stays usable.
        """
        self._check(x, "x")
        if x.shape[1] == 0:
            return x, state
        if self.positions == "rope2d":
            raise ValueError("positions='rope2d' has no order to decode in; use 'rope'")
        q, k, v = self._project(x, x)
        rotary = None
        if self.positions == "rope":
            at = state["position"][:, None] + torch.arange(x.shape[1], device=x.device)
            rotary = (Rotation(at), Rotation(at))
        outer = {"position": state["position"] + x.shape[1]}
        q, k, v = self._prepare(q, k, v, key_mask, state, outer)
        attended, inner = self.variant.resume(
            q,
            k,
            v,
            {name: tensor for name, tensor in state.items() if name not in outer},
            key_mask=key_mask,
            rotary=rotary,
            slopes=self.slopes,
            backend=self.backend,
            inputs=Inputs(x),
        )
        return self._merge_heads(attended.out), {**inner, **outer}

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One token: x [B, C] or [B, 1, C] -> (y of the same shape, new state)."""
        if x.dim() == 2:
            y, state = self.prefill(x.unsqueeze(1), state)
            return y.squeeze(1), state
        if x.dim() != 3 or x.shape[1] != 1:
            raise ValueError(
                f"a step takes one token, [batch, {self.dim}] or [batch, 1, {self.dim}], got {list(x.shape)}"
            )
        return self.prefill(x, state)

    def remember(self, context: Tensor, *, key_mask: Tensor | None = None) -> State:
        """What `recall` needs of a context [B, M, C]: its projected keys and values, or the variant's sums of them.

        With "linear" its size does not depend on M, so that every query costs the same however long the context is.
        """
        context = self._real(context, key_mask)
        k = self._normed(self._heads(self.key(context), self.num_kv_heads), self.key_norm)
        v = self._heads(self.value(context), self.num_kv_heads)
        return self.variant.remember(k, v, key_mask=key_mask, backend=self.backend)

    def recall(self, x: Tensor, state: State) -> Tensor:
        """Cross-attention of x [B, L, C] to a remembered context: `self(x, context)`, without dropout on weights."""
        self._check(x, "x")
        q = self._normed(self._heads(self.query(x), self.num_heads), self.query_norm)
        return self._merge_heads(self.variant.recall(q, state, backend=self.backend, inputs=Inputs(x)).out)

    def cost(self, batch: int, length: int, keys: int | None = None) -> Cost:
        """Cost of one forward pass with projections; see `Cost`."""
        keys = length if keys is None else keys
        size = self.value.weight.element_size()
        inner = self.variant.cost(batch, length, keys, causal=self.causal, positions=self.positions, element_bytes=size)
        from_x = self.query.weight.numel() + self.output.weight.numel()
        from_context = self.key.weight.numel() + self.value.weight.numel()
        weights = sum(p.numel() for p in self.parameters()) - sum(p.numel() for p in self.variant.parameters())
        recurrent = self.causal and "recurrent" in self.variant.can
        taps = 0 if self.convolutions is None else sum(p.numel() for p in self.convolutions.parameters())
        reaches = sum(heads * taken * width for heads, taken, width in self._reaches().values())
        return Cost(
            flops=inner.flops + 2 * batch * (length * (from_x + taps) + keys * from_context),
            bytes_moved=inner.bytes_moved + size * (2 * batch * (length + keys) * self.dim + weights),
            state_bytes=inner.state_bytes + batch * (8 + size * reaches) if recurrent else 0,
            parameters=inner.parameters + weights,
        )

    def extra_repr(self) -> str:
        """What a printed model shows of this layer."""
        kv = f", kv_heads={self.num_kv_heads}" if self.num_kv_heads != self.num_heads else ""
        return f"{self.variant.name}, dim={self.dim}, heads={self.num_heads}{kv}, causal={self.causal}"

    def _attend(self, q, k, v, key_mask, coordinates, inputs: Inputs, **packed: Pack) -> Attended:
        q, k, v = self._prepare(q, k, v, key_mask)
        rotary = None
        if coordinates is not None:
            rotation = Rotation(coordinates, planes=2 if self.positions == "rope2d" else 1)
            rotary = (rotation, rotation)
        return self.variant(
            q,
            k,
            v,
            causal=self.causal,
            key_mask=key_mask,
            rotary=rotary,
            slopes=self.slopes,
            dropout=self.dropout if self.training else 0.0,
            backend=self.backend,
            inputs=inputs,
            **packed,
        )

    def _project(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return (
            self._heads(self.query(x), self.num_heads),
            self._heads(self.key(context), self.num_kv_heads),
            self._heads(self.value(context), self.num_kv_heads),
        )

    def _heads(self, y: Tensor, number: int) -> Tensor:
        return y.unflatten(-1, (number, -1)).transpose(1, 2)

    def _normed(self, y: Tensor, norm: nn.RMSNorm | None) -> Tensor:
        # In the precision of its gain, also under autocast.
        return y if norm is None else norm(y.to(norm.weight.dtype)).to(y.dtype)

    def _prepare(self, q, k, v, key_mask, state: State | None = None, kept: State | None = None):
        """Convolution and norm of projected q, k and v; what the convolutions need of `state`, and leave in `kept`."""
        if self.convolutions is not None:
            results = []
            for (name, convolution), y in zip(self.convolutions.items(), (q, k, v)):
                y, last = convolution(y, key_mask, None if state is None else state[f"{name}_before"])
                results.append(y)
                if kept is not None:
                    kept[f"{name}_before"] = last
            q, k, v = results
        return self._normed(q, self.query_norm), self._normed(k, self.key_norm), v

    def _reaches(self) -> dict[str, tuple[int, int, int]]:
        """Names and shapes, without the batch, of what the convolutions keep while decoding."""
        if self.convolutions is None:
            return {}
        width = self.dim // self.num_heads
        sizes = {"query": self.num_heads, "key": self.num_kv_heads, "value": self.num_kv_heads}
        return {f"{name}_before": (heads, self.short_conv - 1, width) for name, heads in sizes.items()}

    def _merge_heads(self, out: Tensor) -> Tensor:
        return self.output(out.transpose(1, 2).flatten(-2))

    def _require(self, ability: str) -> None:
        if ability not in self.variant.can:
            able = [name for name in available() if ability in variant_class(name).can]
            raise ValueError(f"attention {self.variant.name!r} cannot do {ability!r}; {', '.join(able)} can")

    def _real(self, context: Tensor, key_mask: Tensor | None) -> Tensor:
        """The context, 0 where it is masked: a NaN there would be one in the projections' gradients, as 0 times NaN."""
        self._check_context(context)
        if key_mask is None or key_mask.dtype != torch.bool or key_mask.shape != context.shape[:2]:
            return context  # and what is wrong with the mask is told where all masks are checked
        return torch.where(key_mask.unsqueeze(-1), context, 0.0)

    def _check_context(self, context: Tensor) -> None:
        self._check(context, "context")
        self._require("cross")
        if self.positions is not None or self.convolutions is not None:
            given = f"positions={self.positions!r}" if self.positions is not None else "short_conv"
            raise ValueError(f"{given} has no meaning between two sequences; build without")

    def _check_coordinates(self, coordinates: Tensor | None, x: Tensor) -> None:
        if self.positions not in ("rope", "rope2d"):
            if coordinates is not None:
                raise ValueError(f"coordinates belong to rotary positions; this layer has positions={self.positions!r}")
            return
        each = (x.shape[1], 2) if self.positions == "rope2d" else (x.shape[1],)
        wanted = f"{list(each)} or {[x.shape[0], *each]}"
        if coordinates is None:
            if self.positions == "rope2d":
                raise ValueError(f"positions='rope2d' needs coordinates {wanted}: the row and column of each token")
        elif tuple(coordinates.shape) not in (each, (x.shape[0], *each)):
            raise ValueError(f"coordinates must be {wanted}, got {list(coordinates.shape)}")

    def _check(self, x: Tensor, name: str) -> None:
        if x.dim() != 3 or x.shape[-1] != self.dim:
            raise ValueError(f"{name} must be [batch, length, {self.dim}], got {list(x.shape)}")


def _at(coordinates: Tensor, rows: Tensor, two_dimensional: bool) -> Tensor:
    """Coordinates of packed rows, [T] or [1, T] (or [..., T, 2]) at [n, L]."""
    flat = coordinates[0] if coordinates.dim() == 2 + two_dimensional else coordinates
    return flat[rows]
