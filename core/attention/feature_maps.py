r"""Feature maps phi: R^D -> R^F that turn exp(q.k) into phi(q).phi(k), and so attention into running sums.

A map without parameters is a `FeatureMap` in `FEATURE_MAPS`. It gives its features and, by hand, the gradient through
them, because the blocked forms apply it to one chunk at a time, forward and backward, and never keep [L, F] features.

    elu       elu(x) + 1                                    F = D       Katharopoulos et al. 2020, arXiv:2006.16236
    relu      max(x, 0)                                     F = D       can vanish: the denominator has a floor
    taylor    [1, x/D^(1/4), x_i^2/sqrt(2D), x_i x_j/sqrt(D) for i < j]   F = 1 + D + D(D+1)/2, 153 for D = 16
              phi(q).phi(k) = 1 + s + s^2/2, s = q.k/sqrt(D)            Arora et al. 2024, arXiv:2402.18668
    identity  x, for features that are computed elsewhere   F = D
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class FeatureMap:
    """A feature map without parameters.

    width: D -> F.
    features: x [..., D] -> phi(x) [..., F].
    gradient: (x, phi(x), d phi [..., F]) -> d x [..., D].
    kernel: whether phi(q).phi(k) is a function of q.k; then rotary positions act before the map, else after it.
    positive: whether phi >= 0, so that the weights have a mass.
    floor: lower bound of the denominator per visible key, for maps that can vanish; 0: none needed.
    log_gate: width F -> where a hybrid starts the log of its tail's weight: 0 for maps that estimate exp, else -log F.
    """

    name: str
    width: Callable[[int], int]
    features: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor, Tensor], Tensor]
    kernel: bool = False
    positive: bool = True
    floor: float = 0.0

    def __reduce__(self):
        return feature_map, (self.name,)  # layers that hold a map can be pickled; its functions cannot

    def log_gate(self, width: int) -> float:
        """Where a hybrid starts the log weight of its linear tail, for per-head width `width`."""
        return 0.0 if self.kernel else -math.log(self.width(width))


def _elu(x: Tensor) -> Tensor:
    # Not elu(x) + 1, whose digits cancel for negative x: below -17 it is exactly 0 in float32.
    return x.clamp(max=0).exp().add_(F.relu(x)) if not x.requires_grad else x.clamp(max=0).exp() + F.relu(x)


def _elu_gradient(x: Tensor, phi: Tensor, d: Tensor) -> Tensor:
    return d * phi.clamp(max=1.0)  # elu'(x) = 1 for x > 0, else exp(x) = phi


def _taylor(x: Tensor) -> Tensor:
    width = x.shape[-1]
    rows, columns = torch.triu_indices(width, width, offset=1, device=x.device).unbind()
    return torch.cat(
        (
            torch.ones_like(x[..., :1]),
            x * width**-0.25,
            x.square() * (2 * width) ** -0.5,
            x[..., rows] * x[..., columns] * width**-0.5,
        ),
        dim=-1,
    )


def _taylor_gradient(x: Tensor, phi: Tensor, d: Tensor) -> Tensor:
    width = x.shape[-1]
    rows, columns = torch.triu_indices(width, width, offset=1, device=x.device).unbind()
    linear, square, product = d[..., 1:].split((width, width, len(rows)), dim=-1)
    pairs = x.new_zeros(*x.shape, width)
    pairs[..., rows, columns] = product * width**-0.5
    crossed = (pairs * x.unsqueeze(-2)).sum(-1) + (pairs * x.unsqueeze(-1)).sum(-2)
    return linear * width**-0.25 + square * x * (2 / width) ** 0.5 + crossed


FEATURE_MAPS = {
    one.name: one
    for one in (
        FeatureMap("elu", lambda d: d, _elu, _elu_gradient),
        FeatureMap("relu", lambda d: d, F.relu, lambda x, phi, d: d * (x > 0), floor=1e-6),
        FeatureMap("taylor", lambda d: 1 + d + d * (d + 1) // 2, _taylor, _taylor_gradient, kernel=True),
        FeatureMap("identity", lambda d: d, lambda x: x, lambda x, phi, d: d, kernel=True, positive=False),
    )
}


def feature_map(name: str) -> FeatureMap:
    """The map called `name`.

    Raises:
        ValueError: there is none; the text shows the nearest spelling and all names.
    """
    if name not in FEATURE_MAPS:
        from core.attention.registry import nearest

        raise ValueError(f"unknown feature map {name!r}{nearest(name, FEATURE_MAPS)}; known: {', '.join(FEATURE_MAPS)}")
    return FEATURE_MAPS[name]
