r"""ReLU linear attention over tokens and over their neighbourhoods: EfficientViT's LiteMLA; over tokens alone: Sana's.

With phi(x) = max(x, 0), linear attention runs over (1 + S) times the heads: those of q, k, v, and for every scale s
those of

    q_s = W_s conv_s(q),    k_s, v_s likewise        conv_s depth-wise s x s,  W_s [D, D] per head

    o_h = sum_s P_hs attend_relu(q_s, k_s, v_s)_h,   s = none, then each scale

A ReLU kernel cannot make sharp weights; keys that have looked around make up for it. The convolution is s x s on an
image grid, s on a line, causal where attention is. Each head's normaliser is its own, so there is no mass. The state
is the sums, and the last max(scales) - 1 of q, k and v.

Source:
    Cai et al. 2023 (EfficientViT), arXiv:2205.14756; Xie et al. 2024 (Sana), arXiv:2410.10629 (scales: none, and the
    MLP `mix` of core.backbone)

Where we differ:
    The published layer ends in one projection from all heads of all scales; here P_hs [E, E] brings a head's scales
    together, and the layer's output projection follows, as for every variant. P starts as the mean of the scales. The
    denominator has the floor of `linear`, a share of the visible keys, for an epsilon. The sums are those of `linear`,
    backends included.
"""

import torch
from torch import Tensor, nn

from core.attention.contract import NO_INPUTS, Attended, Cost, Heads, State, Variant, check_inputs
from core.attention.feature_maps import FEATURE_MAPS
from core.attention.grid import check_taps, depthwise, last_positions
from core.attention.registry import register
from core.attention.variants import linear


class Neighbourhood(nn.Module):
    """A depth-wise convolution and a projection per head: [B, H, L, D] -> [B, H, L, D].

    Args:
        heads: H.   width: D.   taps: s, odd.
    """

    def __init__(self, heads: int, width: int, taps: int):
        super().__init__()
        self.taps = taps
        self.kernel = nn.Parameter(torch.empty(heads, width, taps, taps))
        self.project = nn.Parameter(torch.empty(heads, width, width))
        nn.init.uniform_(self.kernel, -1 / taps, 1 / taps)
        nn.init.uniform_(self.project, -(width**-0.5), width**-0.5)

    def forward(self, x: Tensor, **where) -> Tensor:
        """where: causal, mask, grid and before, as in `core.attention.grid.depthwise`."""
        return depthwise(x, self.kernel, **where) @ self.project

    def flops(self, length: int) -> int:
        """On a line of so many positions."""
        heads, width, _ = self.project.shape
        return 2 * length * heads * width * (width + self.taps)


@register(
    "relu_conv",
    summary="ReLU linear attention over tokens and multi-scale neighbourhoods (EfficientViT, Sana); linear",
    source="Cai et al. 2023, arXiv:2205.14756; Xie et al. 2024 (Sana), arXiv:2410.10629",
    pick="high-resolution images",
    stability="relu sums with a floor; convolutions restore locality",
)
class ReluConvAttention(Variant):
    """ReLU linear attention whose heads also see convolved queries, keys and values.

    Args:
        scales: taps of each neighbourhood, odd; empty: attention over the tokens alone, as in Sana.
    """

    can = frozenset({"causal", "bidirectional", "recurrent", "grid"})

    def __init__(self, heads: Heads, *, scales: tuple[int, ...] = (5,)):
        super().__init__(heads)
        if not isinstance(scales, tuple | list):
            raise ValueError(f"scales must be a list of odd numbers, got {scales!r}")
        self.scales = tuple(scales)
        for taps in self.scales:
            check_taps("each of scales", taps)
        sizes = {
            "query": (heads.query, heads.width),
            "key": (heads.key, heads.width),
            "value": (heads.key, heads.value_width),
        }
        self.sizes = sizes
        self.around = nn.ModuleList(
            nn.ModuleDict({name: Neighbourhood(*size, taps) for name, size in sizes.items()}) for taps in self.scales
        )
        parts, width = 1 + len(self.scales), heads.value_width
        self.mix = nn.Parameter(torch.eye(width).div(parts).repeat(parts, heads.query, 1, 1)) if parts > 1 else None
        if not self.scales:
            self.can = type(self).can - {"grid"}

    def forward(
        self,
        q,
        k,
        v,
        *,
        causal=False,
        key_mask=None,
        rotary=None,
        slopes=None,
        dropout=0.0,
        return_mass=False,
        backend="auto",
        inputs=NO_INPUTS,
    ) -> Attended:
        check_inputs(q, k, v, key_mask)
        if q.shape[2] != k.shape[2]:
            raise ValueError(f"relu_conv needs as many queries as keys, got L={q.shape[2]}, M={k.shape[2]}")
        q, k, v = self._looked_around((q, k, v), causal=causal, mask=key_mask, grid=inputs.grid)
        options = {"causal": causal, "key_mask": key_mask, "backend": backend}
        attended, _ = linear.attend(q, k, v, FEATURE_MAPS["relu"], **options)
        return self._mixed(attended.out)

    def init_state(self, batch: int, *, positions=None, device=None, dtype=None) -> State:
        h = self.heads
        all_of_them = Heads(h.query * (1 + len(self.scales)), h.key * (1 + len(self.scales)), h.width, h.value_width)
        state = linear.empty_sum(all_of_them, h.width, batch, None, device, dtype)
        for name, (number, width) in self.sizes.items():
            state[name] = torch.zeros(batch, number, self._reach, width, device=device, dtype=dtype)
        return state

    def resume(
        self, q, k, v, state: State, *, key_mask=None, rotary=None, slopes=None, backend="auto", inputs=NO_INPUTS
    ):
        new = {name: last_positions(x, key_mask, state[name]) for name, x in zip(self.sizes, (q, k, v))}
        q, k, v = self._looked_around((q, k, v), state, causal=True, mask=key_mask)
        sums = {"sum": state["sum"], "count": state["count"]}
        options = {"key_mask": key_mask, "state": sums, "keep": True, "backend": backend}
        attended, total = linear.attend(q, k, v, FEATURE_MAPS["relu"], causal=True, **options)
        return self._mixed(attended.out), {**new, **(total or {})}

    def cost(self, batch, length, keys=None, *, causal=False, positions=None, element_bytes=4) -> Cost:
        h, parts = self.heads, 1 + len(self.scales)
        wide = Heads(h.query * parts, h.key * parts, h.width, h.value_width)
        size = {"causal": causal, "positions": None, "element_bytes": element_bytes}
        sums = linear.sums_cost(wide, FEATURE_MAPS["relu"], h.width, batch, length, length, **size)
        kept = self._reach * sum(number * width for number, width in self.sizes.values())
        around = [one for scale in self.around for one in scale.values()]  # type: ignore[operator]
        mixing = 0 if self.mix is None else 2 * length * self.mix.numel()
        return sums + Cost(
            flops=batch * (mixing + sum(one.flops(length) for one in around)),
            state_bytes=batch * element_bytes * kept if causal else 0,
            parameters=sum(p.numel() for p in self.parameters()),
        )

    @property
    def _reach(self) -> int:
        return max(self.scales, default=1) - 1

    def _looked_around(self, tensors: tuple[Tensor, ...], state: State | None = None, **where) -> list[Tensor]:
        """q, k and v with the heads of every scale behind their own; a group's heads stay together."""
        found = []
        for name, x in zip(self.sizes, tensors):
            parts = [x]
            for scale, taps in zip(self.around, self.scales):
                before = None if state is None else state[name][:, :, self._reach - (taps - 1) :]
                parts.append(scale[name](x, before=before, **where).to(x.dtype))  # type: ignore[index]
            found.append(torch.cat(parts, 1))
        return found

    def _mixed(self, out: Tensor) -> Attended:
        if self.mix is None:
            return Attended(out, None)
        parts = out.unflatten(1, self.mix.shape[:2])
        return Attended((parts @ self.mix).sum(1).to(out.dtype), None)
