"""What q and k go through on their way to the sums: a projection, RMS normalisation, rotation, a feature map."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.attention.contract import Cost, Heads
from core.attention.feature_maps import FeatureMap
from core.attention.learned_maps import LearnedMap, build_map, is_narrow


class FeatureProjection(nn.Module):
    """A per-head projection to the map's width, and RMS normalisation, then the map.

    Maps that estimate exp(q.k) do so near 0 only, and their width or variance explodes with D, so they act on 16
    normalised dimensions by default. Other maps act on the head as it is.

    Args:
        heads: head geometry.
        name: feature map.
        width: dimensions to project to; None: 16 for narrow maps (the head's own width if smaller), else no projection.
        features, seed, redraw_every: of maps that have them, see `build_map`.
    """

    def __init__(
        self,
        heads: Heads,
        name: str,
        width: int | None,
        *,
        features: int | None = None,
        seed: int = 0,
        redraw_every: int = 0,
    ):
        super().__init__()
        if width is not None and not 1 <= width <= heads.width:
            raise ValueError(f"feature_dim must be from 1 to the head width {heads.width}, got {width}")
        default = min(16, heads.width) if is_narrow(name) else heads.width
        self.heads = heads
        self.width = default if width is None else width
        self.map = build_map(name, heads, self.width, features, seed, redraw_every)
        self.query = self.key = None
        if self.width != heads.width:
            self.query = nn.Parameter(torch.empty(heads.query, heads.width, self.width))
            self.key = nn.Parameter(torch.empty(heads.key, heads.width, self.width))
            with torch.no_grad():
                for table in (self.query, self.key):
                    for one in table:
                        nn.init.orthogonal_(one)

    @property
    def turned(self) -> int:
        """Width of what rotary positions rotate."""
        return self.width if self.map.kernel else self.map.width(self.width)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """(q [B, H, L, width], k [B, K, M, width]), on which the map acts."""
        return self.queries(q), self.keys(k)

    def queries(self, q: Tensor) -> Tensor:
        """What the map acts on, from queries [B, H, L, D]."""
        return self._narrow(q, self.query)

    def keys(self, k: Tensor) -> Tensor:
        """What the map acts on, from keys [B, K, M, D]."""
        return self._narrow(k, self.key)

    def _narrow(self, x: Tensor, table: Tensor | None) -> Tensor:
        y = x if table is None else x @ table
        return (F.rms_norm(y, (self.width,)) if self.map.narrow else y).to(x.dtype)

    def cost(self, batch: int, length: int, keys: int) -> Cost:
        """Cost of projecting `length` queries and `keys` keys and of the features of a `LearnedMap`."""
        flops = parameters = 0
        if self.query is not None and self.key is not None:
            flops = 2 * (length * self.query.numel() + keys * self.key.numel())
            parameters = self.query.numel() + self.key.numel()
        if isinstance(self.map, LearnedMap):
            flops += (length * self.heads.query + keys * self.heads.key) * self.map.flops(self.width)
            parameters += sum(p.numel() for p in self.map.parameters())
        return Cost(flops=batch * flops, parameters=parameters)


class Featured(NamedTuple):
    """q and k on their way to the sums.

    q, k, phi: what the sums take.   rotary: what is left to rotate by, on the features.
    level: [B, H, L] to add to the log mass, or None.
    """

    q: Tensor
    k: Tensor
    phi: FeatureMap
    rotary: tuple | None
    level: Tensor | None


def featured(q: Tensor, k: Tensor, phi: FeatureMap | LearnedMap, rotary: tuple | None) -> Featured:
    """Do all that has to be done before the sums: rotate where the map is a function of q.k, apply a learned map."""
    if rotary is not None and phi.kernel:
        q, k, rotary = rotary[0](q), rotary[1](k), None
    if not isinstance(phi, LearnedMap):
        return Featured(q, k, phi, rotary, None)
    q, k, level = phi(q, k)
    return Featured(q, k, phi.given, rotary, level)
