"""What every attention mechanism here promises, and the few types they share.

Shape letters, used in all files of this package:
    B batch, H query heads, K key/value heads (H is a multiple of K), L queries, M keys,
    D query/key width, E value width, F feature width (after a feature map), W window, C chunk, N sequences in a pack

A mechanism maps q [B, H, L, D], k [B, K, M, D], v [B, K, M, E] to a weighted mean of the values per query, and where
its weights are non-negative sums, also to the log of their mass. Two results over disjoint key sets then add up
(`merge`): a window and a linear tail, global tokens and local ones, key shards of several devices, an old state and
new keys.
"""

from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from core.attention.autocast import lowered


class Attended(NamedTuple):
    """A weighted mean of values and the log of the weights' sum.

    out: [B, H, L, E] in the dtype of the values; 0 where a query sees no key.
    log_mass: [B, H, L] in float32 (float64 for float64 inputs), -inf where a query sees no key; None where the
        mechanism has no mass.
    """

    out: Tensor
    log_mass: Tensor | None


def merge(*parts: Attended) -> Attended:
    """Attention over the union of disjoint key sets, from the attention over each.

        l = log sum_p exp(l_p),    o = sum_p exp(l_p - l) o_p

    Commutative and associative; `(0, -inf)`, the result over no keys, is neutral. A key that stands in two parts
    counts twice. Gradients flow through the means and through the masses.

    Args:
        parts: one or more results with a mass, all [B, H, L, E] and [B, H, L].

    Returns:
        `Attended`, out in the dtype of the first part.

    Raises:
        ValueError: no parts, a part without mass, or shapes that differ.
    """
    if not parts:
        raise ValueError("merge needs at least one part")
    for i, part in enumerate(parts):
        if part.log_mass is None:
            raise ValueError(f"merge: part {i} has no mass, so its share of the whole is unknown")
        if part.out.shape != parts[0].out.shape or part.log_mass.shape != part.out.shape[:-1]:
            raise ValueError(
                f"merge: part {i} has out {list(part.out.shape)} and log_mass {list(part.log_mass.shape)}; "
                f"expected {list(parts[0].out.shape)} and {list(parts[0].out.shape[:-1])}"
            )
    if len(parts) == 1:
        return parts[0]
    return Attended(*_Merge.apply(*(tensor for part in parts for tensor in part)))


class _Merge(torch.autograd.Function):
    # By hand, because autograd through the guards for -inf (an empty part) would give 0 * inf = NaN:
    # with p = exp(l_p - l): d o_p = p do,  d l_p = p (dl + <do, o_p - o>).

    @staticmethod
    def forward(*flat):
        outs, masses = flat[0::2], flat[1::2]
        top = torch.stack(masses).amax(0)
        top = torch.where(top == -torch.inf, 0.0, top)
        weights = [torch.exp(mass - top) for mass in masses]
        total = sum(weights[1:], weights[0])
        inverse = torch.where(total == 0, 0.0, 1 / torch.where(total == 0, 1.0, total))
        shares = [weight * inverse for weight in weights]
        out = outs[0] * shares[0].unsqueeze(-1)
        for share, part in zip(shares[1:], outs[1:]):
            out = out + part * share.unsqueeze(-1)
        return out.to(outs[0].dtype), top + torch.log(total)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs, output[1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        do, dl = grads
        *flat, mass = ctx.saved_tensors
        outs = flat[0::2]
        shares = [torch.exp(one - torch.where(mass == -torch.inf, 0.0, mass)) for one in flat[1::2]]
        do = do.to(shares[0].dtype)  # differences of rounded outputs would cost the masses their digits
        along = [(do * part).sum(-1) for part in outs]
        whole = sum(share * one for share, one in zip(shares, along))
        flat = []
        for part, share, one in zip(outs, shares, along):
            flat += [(do * share.unsqueeze(-1)).to(part.dtype), share * (dl + one - whole)]
        return tuple(flat)


@dataclass(frozen=True)
class Heads:
    """The head geometry that the layer hands to a variant.

    query: number of query heads H.   key: number of key/value heads K, dividing H.
    width: D, per-head width of q and k.   value_width: E, per-head width of v.
    model: C, width of the layer's input, for variants that learn gates from it; None outside of a layer.
    """

    query: int
    key: int
    width: int
    value_width: int
    model: int | None = None

    def __post_init__(self):
        if min(self.query, self.key, self.width, self.value_width) < 1:
            raise ValueError(f"heads and their widths must be at least 1, got {self}")
        if self.query % self.key:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads: {self.query} is not a multiple of {self.key}"
            )

    @property
    def group(self) -> int:
        """Query heads that share one key head."""
        return self.query // self.key

    def input_width(self, name: str) -> int:
        """C, for the variant `name`, which cannot do without the layer's input.

        Raises:
            ValueError: it was built outside of a layer.
        """
        if self.model is None:
            raise ValueError(
                f"attention {name!r} reads the layer's input: build it by Attention, or give Heads(model=C)"
            )
        return self.model


class Inputs(NamedTuple):
    """What a layer knows beside q, k and v, for the variants that look at it.

    x: [B, L, C], the layer's input, from which self-attention's q, k and v were projected.
    grid: (rows, columns) of an image whose tokens, row by row, are the last rows * columns of the sequence; None: it
        is a line.
    marked: [B, L] bool, True for global tokens; None: none.
    """

    x: Tensor | None = None
    grid: tuple[int, int] | None = None
    marked: Tensor | None = None


NO_INPUTS = Inputs()
"""Outside of a layer nothing else is known."""


@dataclass(frozen=True)
class Cost:
    """What one forward pass of a mechanism (or stack) costs.

    flops: floating point operations, a multiply-add counted as two.
    bytes_moved: bytes that must travel between memory and processor at least once (inputs, outputs, states).
    state_bytes: bytes of the decoding state after `length` tokens; 0 for what cannot decode.
    parameters: learned numbers.
    """

    flops: int = 0
    bytes_moved: int = 0
    state_bytes: int = 0
    parameters: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(a + b for a, b in zip(astuple(self), astuple(other))))


State = dict[str, Tensor]
"""A decoding state: named tensors, batch first. Never changed in place, so an old state stays usable."""


class Variant(nn.Module):
    """One attention mechanism, between the projections and the output of `Attention`.

    A subclass declares what it can do and implements `forward`; a recurrent one also `init_state` and `resume`; one
    that can cross and needs less than all keys afterwards also `remember` and `recall`.

    can: out of
        causal         query i sees keys j <= i + M - L
        bidirectional  every query sees every key
        cross          keys from another sequence of another length (without causal)
        recurrent      a state, so that prefill and step equal one pass over the whole
        mass           the result carries a log mass and can be merged
        dropout        dropout on the attention weights
        grid           looks at the image grid, where it is told one
        global         takes global tokens: seen by all, seeing all
    An instance may declare less than its class where an option rules something out.
    positions: which of "rope", "alibi" it can compose with (docs/attention.md).
    anchor: what its pattern of keys is counted from: "" nothing, padding on either side changes nothing; "start", so
        padding belongs on the right; "length", so it is applied to whole sequences without padding.
    growth: how its cost grows with the length: "linear", "log-linear", "root" (L^1.5) or "quadratic".
    uncompiled: why torch.compile(fullgraph=True) cannot take it; "" where it can.
    moving: attributes that every pass in training changes (counters of draws); a recomputed pass finds them as it did.
    tied: names of parameters that all layers of a stack share; `core.backbone` makes them one.
    unread: names of parts of the layer that it does not read; they are frozen, for no gradient would reach them.
    """

    name: ClassVar[str]
    can: frozenset[str]
    positions: frozenset[str] = frozenset()
    anchor: ClassVar[str] = ""
    growth: ClassVar[str] = "linear"
    uncompiled: ClassVar[str] = ""
    moving: ClassVar[tuple[str, ...]] = ()
    tied: tuple[str, ...] = ()
    unread: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, heads: Heads):
        super().__init__()
        self.heads = heads

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **options) -> Attended:
        """`forward`, after autocast: the one entrance of all variants."""
        return super().__call__(*lowered(q, k, v), **options)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        causal: bool = False,
        key_mask: Tensor | None = None,
        rotary: "tuple | None" = None,
        slopes: Tensor | None = None,
        dropout: float = 0.0,
        return_mass: bool = False,
        backend: str = "auto",
        inputs: Inputs = NO_INPUTS,
    ) -> Attended:
        """Attend.

        Args:
            q: [B, H, L, D], normalised but not rotated.   k: [B, K, M, D].   v: [B, K, M, E].
            causal: bottom-right aligned; the last query sees the last key.
            key_mask: [B, M] bool, True where a key is real.
            rotary: (for queries, for keys), two `positions.Rotation`, or None.
            slopes: [H] ALiBi slopes, or None.
            dropout: probability on the attention weights, 0 in evaluation.
            return_mass: also give the log mass.
            backend: which implementation; "auto" chooses.
            inputs: the layer's input and what else it knows.
        """
        raise NotImplementedError

    def reads_packs(self, q: Tensor, v: Tensor, *, backend: str = "auto") -> bool:
        """Whether `forward` would take a `packing.Pack` of these as `pack`; others get padded batches."""
        return False

    def init_state(self, batch: int, *, positions: str | None = None, device=None, dtype=None) -> State:
        """The state before the first token; positions: what the layer composes with, where the state depends on it."""
        raise NotImplementedError(f"attention {self.name!r} has no decoding state")

    def resume(self, q: Tensor, k: Tensor, v: Tensor, state: State, **options) -> tuple[Attended, State]:
        """Causal attention of new tokens to the state and to each other: prefill, and with L = 1 a step.

        Args:
            q, k, v: the new tokens.   state: what came before.
            **options: key_mask, rotary, slopes, backend and inputs, as in `forward`.
        """
        raise NotImplementedError(f"attention {self.name!r} has no decoding state")

    def remember(self, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, backend: str = "auto") -> State:
        """What queries of another sequence will need of these keys and values, for variants that can cross."""
        state = {"keys": hide(k, key_mask), "values": hide(v, key_mask)}
        return state if key_mask is None else {**state, "mask": key_mask}

    def recall(self, q: Tensor, state: State, *, backend: str = "auto", inputs: Inputs = NO_INPUTS) -> Attended:
        """Attend to what `remember` kept; as `forward` over those keys."""
        options = {"key_mask": state.get("mask"), "backend": backend, "inputs": inputs}
        return self(q, state["keys"], state["values"], **options)

    def cost(
        self,
        batch: int,
        length: int,
        keys: int | None = None,
        *,
        causal: bool = False,
        positions: str | None = None,
        element_bytes: int = 4,
    ) -> Cost:
        """Cost of one forward pass over `length` queries and `keys` keys (default: as many)."""
        raise NotImplementedError


def state_bytes(state: State) -> int:
    """Bytes that a decoding state occupies."""
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of states, normalisers and masses: float64 for float64 inputs, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


Sees = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A pattern: whether a query of a head at i sees the key at j; three index tensors that broadcast, to bool. The last
query stands at the last key."""


def near(window: int) -> Sees:
    """The pattern of a window: |i - j| < window."""
    return lambda head, i, j: (i - j).abs() < window


def visible(
    queries: int,
    keys: int,
    *,
    causal: bool = False,
    window: int | None = None,
    sees: Sees | None = None,
    heads: int = 1,
    key_mask: Tensor | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Which key each query sees, as a dense mask [L, M], or [B, 1, L, M] with a key mask. For references only.

    sees: a pattern; if `heads` is more than one, it tells them apart, and the mask is [H, L, M] or [B, H, L, M].

    Causal is bottom-right aligned; here L = 3, M = 5 (1 = visible), and the same with window 2:

        1 1 1 0 0        0 1 1 0 0
        1 1 1 1 0        0 0 1 1 0
        1 1 1 1 1        0 0 0 1 1
    """
    at = torch.arange(queries, device=device)[:, None] + (keys - queries)
    key = torch.arange(keys, device=device)[None, :]
    seen = torch.ones(queries, keys, dtype=torch.bool, device=device)
    if causal:
        seen &= key <= at
    if window is not None:
        seen &= near(window)(torch.zeros_like(key), at, key)
    if sees is not None:
        head = torch.arange(heads, device=device)[:, None, None] if heads > 1 else torch.zeros_like(key)
        seen = seen & sees(head, at, key)
    return seen if key_mask is None else seen & key_mask[:, None, None, :]


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """[B, K, M, D] -> [B, H, M, D], query head h reading key head h // (H // K). For references only."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def hide(x: Tensor, key_mask: Tensor | None) -> Tensor:
    """Zero the rows of masked keys, x [B, K, M, D]; `where`, not a product, because padding may hold NaN."""
    return x if key_mask is None else torch.where(key_mask[:, None, :, None], x, 0.0)


def check_whole(name: str, value: int, least: int = 1, what: str = "") -> None:
    """Raise ValueError unless the option `name` is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}{what}, got {value!r}")


def check_inputs(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None, slopes: Tensor | None = None
) -> Heads:
    """Raise ValueError with expected and given unless q, k, v, mask and slopes fit; give the head geometry."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{name} must be [batch, heads, length, width], got shape {list(x.shape)}")
        if not x.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {x.dtype}")
    batch, heads, _, width = q.shape
    if k.shape[0] != batch or k.shape[3] != width or k.shape[1] < 1 or heads % k.shape[1]:
        raise ValueError(
            f"k must be [{batch}, heads dividing {heads}, length, {width}] to go with q {list(q.shape)}, "
            f"got {list(k.shape)}"
        )
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v must be {list(k.shape[:3])} + [width] to go with k, got {list(v.shape)}")
    if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.shape != (batch, k.shape[2])):
        raise ValueError(
            f"key_mask must be bool [{batch}, {k.shape[2]}], True where a key is real, "
            f"got {key_mask.dtype} {list(key_mask.shape)}"
        )
    if slopes is not None and (slopes.shape != (heads,) or slopes.requires_grad):
        raise ValueError(
            f"slopes must be [{heads}] constants, one per head, got {list(slopes.shape)}"
            f"{', which require a gradient' if slopes.requires_grad else ''}"
        )
    return Heads(heads, k.shape[1], width, v.shape[3])
