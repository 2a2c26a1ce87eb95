r"""Feature maps with parameters: hedgehog, t2r, focused; those with random buffers are in `random_features`.

A `LearnedMap` gives the features of all queries and keys by plain autograd, [B, H, L, F] in float32, and the blocked
sums then take them as "given". Query head h uses the tables of its own and of key head h // (H // K).

    hedgehog   [softmax(W x), softmax(-W x)]                F = 2D      Zhang et al. 2024, arXiv:2402.04347
    t2r        max(W x + b, 0)                              F           Kasai et al. 2021, arXiv:2103.13076
    focused    |r| r^3 / |r^3|,  r = (max(x, 0) + 1e-6) / softplus(s)   F = D   Han et al. 2023, arXiv:2308.00442

Where we differ:
    hedgehog and t2r have tables of their own for queries and for keys, which start equal: the identity for hedgehog, an
    orthogonal matrix for t2r. Hedgehog's softmax runs over the D numbers of each sign, as in the paper; one softmax
    over all 2D, as some libraries have it, is another function. The power of focused is taken of r / max(r), which
    changes nothing but cannot overflow; its lengths are those of a head, not of all heads together; it has no table
    of positions. Its depth-wise convolution is `conv` of the variants, for every map.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.attention.blocked import full_precision
from core.attention.contract import Heads, accumulator
from core.attention.feature_maps import FEATURE_MAPS, FeatureMap

LEARNED_MAPS = ("favor", "favor_relu", "focused", "hedgehog", "t2r")
"""Names of the maps with parameters or buffers."""


class LearnedMap(nn.Module):
    """A feature map with parameters or buffers; what it declares means the same as in `FeatureMap`.

    Args:
        heads: head geometry.
        width: D, width of the vectors it acts on.
        features: F.
        rows: of the matrix that its products are with; 0: none.
    """

    name: str
    kernel = False
    positive = True
    floor = 0.0
    narrow = False

    def __init__(self, heads: Heads, width: int, features: int, rows: int = 0):
        super().__init__()
        self.heads, self.features, self.rows = heads, features, rows

    def width(self, width: int) -> int:
        """F, whatever the input's width."""
        return self.features

    def log_gate(self, width: int) -> float:
        """Where a hybrid starts its tail's log weight: 0 where weights are to be those of a softmax, else -log F."""
        return -math.log(self.features) if self.floor else 0.0

    @property
    def given(self) -> FeatureMap:
        """What the sums see."""
        return FEATURE_MAPS["given_floored" if self.floor else "given"]

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Features of q [B, H, L, D] and of k [B, K, M, D], and what is missing in each query's log mass [B, H, L]."""
        acc = accumulator(q.dtype)
        with full_precision(q.device):
            return self._features(q.to(acc), k.to(acc))

    def _features(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """`forward` in the accumulator's precision, autocast off."""
        raise NotImplementedError

    def flops(self, width: int) -> int:
        """Of the products that one vector's features take; a multiply-add counts as two."""
        return 2 * width * self.rows


class _Tables(LearnedMap):
    """Matrices [H, rows, D] for queries and [K, rows, D] for keys, the same at the start in all heads of a group."""

    def __init__(self, heads: Heads, width: int, features: int, rows: int):
        super().__init__(heads, width, features, rows)
        self.query = nn.Parameter(torch.empty(heads.query, rows, width))
        self.key = nn.Parameter(torch.empty(heads.key, rows, width))


class Hedgehog(_Tables):
    """Two softmaxes over the features of x and of -x: spiky weights that are learned from a softmax or from scratch."""

    name = "hedgehog"

    def __init__(self, heads: Heads, width: int):
        super().__init__(heads, width, 2 * width, width)
        with torch.no_grad():
            for table in (self.query, self.key):
                table.copy_(torch.eye(width))

    def _features(self, q, k):
        return self._one(q, self.query), self._one(k, self.key), None

    def _one(self, x: Tensor, table: Tensor) -> Tensor:
        y = x @ table.to(x.dtype).mT
        # The bound keeps sums of products of two rare features above the smallest float32.
        return torch.cat((torch.softmax(y, -1), torch.softmax(-y, -1)), -1).clamp(min=1e-12)


class T2R(_Tables):
    """A learned layer with a ReLU: the map that turned trained transformers into recurrent ones."""

    name = "t2r"
    floor = FEATURE_MAPS["relu"].floor

    def __init__(self, heads: Heads, width: int, features: int | None = None):
        features = width if features is None else features
        super().__init__(heads, width, features, features)
        self.query_bias = nn.Parameter(torch.zeros(heads.query, self.features))
        self.key_bias = nn.Parameter(torch.zeros(heads.key, self.features))
        with torch.no_grad():
            for one in self.key:
                nn.init.orthogonal_(one)
            self.query.copy_(self.key.repeat_interleave(heads.group, 0))

    def _features(self, q, k):
        return self._one(q, self.query, self.query_bias), self._one(k, self.key, self.key_bias), None

    def _one(self, x: Tensor, table: Tensor, bias: Tensor) -> Tensor:
        return F.relu(x @ table.to(x.dtype).mT + bias.to(x.dtype).unsqueeze(-2))


class Focused(LearnedMap):
    """Vectors of non-negative numbers, turned towards their largest ones without changing their length."""

    name = "focused"
    floor = FEATURE_MAPS["relu"].floor
    power = 3

    def __init__(self, heads: Heads, width: int):
        super().__init__(heads, width, width)
        self.scale = nn.Parameter(torch.zeros(heads.key, width))

    def factor(self) -> Tensor:
        """1 / softplus(s) [K, D] in float32, for kernels that compute the rest."""
        return 1 / F.softplus(self.scale.float())

    def _features(self, q, k):
        of_keys = self.scale.unsqueeze(-2)
        return self._one(q, of_keys.repeat_interleave(self.heads.group, 0)), self._one(k, of_keys), None

    def _one(self, x: Tensor, scale: Tensor) -> Tensor:
        r = (F.relu(x) + 1e-6) / F.softplus(scale.to(x.dtype))
        y = (r / r.amax(-1, keepdim=True)).pow(self.power)
        return y * (
            torch.linalg.vector_norm(r, dim=-1, keepdim=True) / torch.linalg.vector_norm(y, dim=-1, keepdim=True)
        )


def build_map(
    name: str, heads: Heads, width: int, features: int | None, seed: int, redraw_every: int
) -> FeatureMap | LearnedMap:
    """The map called `name` for these heads and this input width.

    Raises:
        ValueError: there is none, or it has no such option.
    """
    random = name in ("favor", "favor_relu")
    if features is not None and not random and name != "t2r":
        raise ValueError(f"features is the width of favor, favor_relu and t2r; {name!r} has its own")
    if (seed or redraw_every) and not random:
        raise ValueError(f"seed and redraw_every belong to favor and favor_relu; {name!r} draws nothing")
    if features is not None and (isinstance(features, bool) or not isinstance(features, int) or features < 1):
        raise ValueError(f"features must be a whole number of at least 1, got {features!r}")
    if random:
        from core.attention.random_features import RANDOM_MAPS

        return RANDOM_MAPS[name](heads, width, features, seed, redraw_every)
    if name == "t2r":
        return T2R(heads, width, features)
    if name in ("hedgehog", "focused"):
        return {"hedgehog": Hedgehog, "focused": Focused}[name](heads, width)
    known = [one for one in FEATURE_MAPS if not one.startswith("given")]
    if name in known:
        return FEATURE_MAPS[name]
    from core.attention.registry import nearest

    known = sorted((*known, *LEARNED_MAPS))
    raise ValueError(f"unknown feature map {name!r}{nearest(name, known)}; known: {', '.join(known)}")


def is_narrow(name: str) -> bool:
    """Whether the map acts on few normalised dimensions by default."""
    return name in ("favor", "favor_relu") or (name in FEATURE_MAPS and FEATURE_MAPS[name].narrow)
