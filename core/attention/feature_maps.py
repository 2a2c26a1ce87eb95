r"""Feature maps phi: R^D -> R^F that turn exp(q.k) into phi(q).phi(k), and so attention into running sums.

A map without parameters is a `FeatureMap` in `FEATURE_MAPS`. It gives its features and, by hand, the gradient through
them, because the blocked forms apply it to one chunk at a time, forward and backward, and never keep [L, F] features.
Maps with parameters or buffers (favor, favor_relu, hedgehog, t2r, focused) are in `core.attention.learned_maps`.

    elu       elu(x) + 1                                    F = D       Katharopoulos et al. 2020, arXiv:2006.16236
    relu      max(x, 0)                                     F = D       can vanish: the denominator has a floor
    silu      x sigmoid(x)                                  F = D       signed: only without the denominator
    taylor    [1, x/D^(1/4), x_i^2/sqrt(2D), x_i x_j/sqrt(D) for i < j]   F = 1 + D + D(D+1)/2, 153 for D = 16
              phi(q).phi(k) = 1 + s + s^2/2, s = q.k/sqrt(D)            Arora et al. 2024, arXiv:2402.18668
    cosine    [1, x/|x|]                                    F = D + 1   Li et al. 2020, arXiv:2007.14902
              phi(q).phi(k) = 1 + cos(q, k); vanishes for opposite vectors
    dpfp      r_i r_{i-n} for n = 1..nu, indices wrapped, r = [max(x, 0), max(-x, 0)]   F = 2 D nu
              nu is 1; 2 and 3 in dpfp-2 and dpfp-3                     Schlag et al. 2021, arXiv:2102.11174
    identity  x                                             F = D       signed
    given     x, for non-negative features that are computed elsewhere; given_floored: if they can vanish
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST_SHARE = 1e-6
"""Floor of the denominator per visible key, for maps that can vanish."""

LEAST_LENGTH = 1e-6
"""Vectors shorter than this are not scaled to length 1."""


@dataclass(frozen=True)
class FeatureMap:
    """A feature map without parameters.

    width: D -> F.
    features: x [..., D] -> phi(x) [..., F].
    gradient: (x, phi(x), d phi [..., F]) -> d x [..., D].
    kernel: whether phi(q).phi(k) is a function of q.k alone; then rotary positions act before the map, else after it.
    positive: whether phi(q).phi(k) >= 0, so that the weights have a mass.
    floor: lower bound of the denominator per visible key, for maps that can vanish; 0: none needed.
    narrow: whether it acts on few RMS-normalised dimensions by default: it estimates exp near 0 only.
    """

    name: str
    width: Callable[[int], int]
    features: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor, Tensor], Tensor]
    kernel: bool = False
    positive: bool = True
    floor: float = 0.0
    narrow: bool = False

    def __reduce__(self):
        return feature_map, (self.name,)  # layers that hold a map can be pickled; its functions cannot

    def log_gate(self, width: int) -> float:
        """Where a hybrid starts its tail's log weight: 0 for functions of q.k, about 1 near 0, else -log F."""
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


def _silu_gradient(x: Tensor, phi: Tensor, d: Tensor) -> Tensor:
    gate = torch.sigmoid(x)
    return d * (gate + phi * (1 - gate))


def _length(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True)


def _cosine(x: Tensor) -> Tensor:
    return torch.cat((torch.ones_like(x[..., :1]), x / _length(x).clamp(min=LEAST_LENGTH)), -1)


def _cosine_gradient(x: Tensor, phi: Tensor, d: Tensor) -> Tensor:
    length, unit, d = _length(x), phi[..., 1:], d[..., 1:]
    along = (unit * d).sum(-1, keepdim=True).masked_fill(length < LEAST_LENGTH, 0.0)  # there the length is a constant
    return (d - unit * along) / length.clamp(min=LEAST_LENGTH)


def _dpfp(nu: int) -> FeatureMap:
    def features(x: Tensor) -> Tensor:
        r = F.relu(torch.cat((x, -x), -1))
        return torch.cat([r * r.roll(n, -1) for n in range(1, nu + 1)], -1)

    def gradient(x: Tensor, phi: Tensor, d: Tensor) -> Tensor:
        r = F.relu(torch.cat((x, -x), -1))
        dr = torch.zeros_like(r)
        for n, part in enumerate(d.chunk(nu, -1), start=1):
            dr += part * r.roll(n, -1) + (part * r).roll(-n, -1)
        above, below = dr.chunk(2, -1)
        return above * (x > 0) - below * (x < 0)

    name = "dpfp" if nu == 1 else f"dpfp-{nu}"
    return FeatureMap(name, lambda d: 2 * d * nu, features, gradient, floor=LEAST_SHARE)


def _itself(name: str, **kind) -> FeatureMap:
    return FeatureMap(name, lambda d: d, lambda x: x, lambda x, phi, d: d, **kind)


FEATURE_MAPS = {
    one.name: one
    for one in (
        FeatureMap("elu", lambda d: d, _elu, _elu_gradient),
        FeatureMap("relu", lambda d: d, F.relu, lambda x, phi, d: d * (x > 0), floor=LEAST_SHARE),
        FeatureMap("silu", lambda d: d, F.silu, _silu_gradient, positive=False),
        FeatureMap("taylor", lambda d: 1 + d + d * (d + 1) // 2, _taylor, _taylor_gradient, kernel=True, narrow=True),
        FeatureMap("cosine", lambda d: d + 1, _cosine, _cosine_gradient, kernel=True, floor=LEAST_SHARE),
        *(_dpfp(nu) for nu in (1, 2, 3)),
        _itself("identity", kernel=True, positive=False),
        _itself("given"),
        _itself("given_floored", floor=LEAST_SHARE),
    )
}


def feature_map(name: str) -> FeatureMap:
    """The map called `name`.

    Raises:
        ValueError: there is none without parameters; the text shows the nearest spelling and all names.
    """
    if name not in FEATURE_MAPS:
        from core.attention.learned_maps import LEARNED_MAPS
        from core.attention.registry import nearest

        if name in LEARNED_MAPS:
            raise ValueError(
                f"feature map {name!r} has parameters or buffers, which a function cannot keep: "
                f"use Attention(..., 'linear', feature_map={name!r})"
            )
        raise ValueError(f"unknown feature map {name!r}{nearest(name, FEATURE_MAPS)}; known: {', '.join(FEATURE_MAPS)}")
    return FEATURE_MAPS[name]
