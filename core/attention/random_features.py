r"""Random features: FAVOR+, an unbiased estimate of the softmax kernel, and its ReLU cousin.

With y = x / D^(1/4), rows omega_r ~ N(0, I) and m of them,

    favor        phi_r(x) = exp(omega_r.y - |y|^2 / 2) / sqrt(m)     E phi(q).phi(k) = exp(q.k / sqrt(D))
    favor_relu   phi_r(x) = max(omega_r.y, 0) / sqrt(m) + 1e-3

The rows come in orthogonal blocks of D, each row with the length of a Gaussian one: still unbiased, less variance.

Source:
    Choromanski et al. 2021, arXiv:2009.14794

Where we differ:
    The exponentials need a stabiliser that cancels between numerator and denominator. Per query it is the maximum over
    r. For keys a maximum over positions reads the future and the padding, and a running one is a state to carry and
    rescale. Here inputs are RMS-normalised (`FeatureProjection`), so |y| <= D^(1/4), and no exponent exceeds

        b = max_r |omega_r| D^(1/4) - sqrt(D) / 2

    A constant, c = max(0, b - 40), is subtracted from all keys: exactly causal, without a state. float32 reaches
    e^87, so e^47 is left for sums over keys and features, for any D. At the other end exponents of a key are
    -sqrt(D)/2 +- D^(1/4) (one standard deviation) - c; for D = 256, where b is about 65, that is -33 +- 4, and a
    query's, relative to its maximum, about -13 +- 4, so products stay far above e^-87. Beyond D = 256 they fall
    towards it. What was subtracted returns in the log mass. There is no epsilon inside of phi: it would not cancel.

    The layer narrows the head to 16 normalised dimensions by default, because the relative variance grows like
    exp(|q + k|^2 / sqrt(D)): for q and k at a right angle e^8 at D = 16, e^16 at D = 64.

    Rotary positions rotate the features, in the numerator only (as Su et al. 2021, arXiv:2104.09864, do), not q and k:
    phi(R_i q).phi(R_j k) has the right mean, but for a given omega it depends on i and j, not on i - j, so that padding
    would change results.

    omega is a buffer per key head, a pure function of (seed, number of redraws), so all ranks and all resumed runs
    agree; it and its counters are in the state_dict. It changes by `redraw()`, or every `redraw_every` forward passes
    in training, never in evaluation, and recomputation in the backward does not count. A decoding state is worthless
    after a redraw.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from core.attention.blocked.pairs import alone, like
from core.attention.contract import Heads
from core.attention.learned_maps import LearnedMap

ROOM = 40.0
"""Largest exponent of a key's feature."""


def default_features(width: int) -> int:
    """D ln D, up to a multiple of 16."""
    return 16 * max(1, math.ceil(width * math.log(width) / 16))


def draw(heads: int, features: int, width: int, seed: int, redraws: int = 0, *, orthogonal: bool = True) -> Tensor:
    """omega [heads, features, width], float64: Gaussian rows in orthogonal blocks, from (seed, redraws) alone."""
    seeds = torch.randint(2**31, (redraws + 1,), generator=torch.Generator().manual_seed(seed), device="cpu")
    generator = torch.Generator().manual_seed(int(seeds[-1]))
    options = {"generator": generator, "dtype": torch.float64, "device": "cpu"}
    rows = torch.randn(heads, features, width, **options)
    if not orthogonal:
        return rows
    q, r = torch.linalg.qr(torch.randn(heads, -(-features // width), width, width, **options))
    q = q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)  # without this, QR prefers some directions
    return q.flatten(1, 2)[:, :features] * rows.norm(dim=-1, keepdim=True)


class RandomFeatures(LearnedMap):
    """What both maps share: omega, its counters, and when it changes.

    Args:
        heads: head geometry.   width: D.
        features: m; None: D ln D, up to a multiple of 16.
        seed: of omega.
        redraw_every: forward passes in training between two draws; 0: never.
    """

    narrow = True
    omega: Tensor
    counters: Tensor

    def __init__(self, heads: Heads, width: int, features: int | None, seed: int, redraw_every: int):
        features = default_features(width) if features is None else features
        super().__init__(heads, width, features, features)
        for name, value in (("seed", seed), ("redraw_every", redraw_every)):
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
                raise ValueError(f"{name} must be a whole number from 0 to 2^31 - 1, got {value!r}")
        self.redraw_every = redraw_every
        placed = {"dtype": torch.get_default_dtype(), "device": torch.get_default_device()}
        self.register_buffer("omega", draw(heads.key, self.features, width, seed).to(**placed))
        # seed, redraws so far, forward passes in training so far
        self.register_buffer("counters", torch.tensor([seed, 0, 0], device=placed["device"]))

    def redraw(self) -> None:
        """Draw the next omega."""
        self.counters[1] += 1
        self.omega.copy_(_drawn(self.omega, self.counters))

    def current(self) -> Tensor:
        """omega for this forward pass; counts it, and redraws when it is time."""
        if not (self.training and self.redraw_every):
            return self.omega
        omega, counters = favor_redraw(self.omega, self.counters, self.redraw_every)
        with torch.no_grad():
            self.omega.copy_(omega)
            self.counters.copy_(counters)
        return omega  # not the buffer: a backward may come after it has changed

    def projected(self, x: Tensor, omega: Tensor) -> Tensor:
        """omega_r.y for x [B, H or K, L, D]."""
        y = (x * x.shape[-1] ** -0.25).unflatten(1, (self.heads.key, -1))
        return (y @ omega.to(x.dtype).unsqueeze(1).mT).flatten(1, 2)


class Favor(RandomFeatures):
    """Positive random features of the softmax kernel."""

    name = "favor"

    def _features(self, q, k):
        omega = self.current()
        width = q.shape[-1]
        longest = torch.linalg.vector_norm(omega.to(q.dtype), dim=-1).amax()
        taken = (longest * width**0.25 - width**0.5 / 2 - ROOM).clamp(min=0)
        each = -0.5 * math.log(self.features)
        of_queries, of_keys = (self.projected(x, omega) - self._half_square(x) + each for x in (q, k))
        top = of_queries.detach().amax(-1, keepdim=True)
        return torch.exp(of_queries - top), torch.exp(of_keys - taken), top.squeeze(-1) + taken

    def _half_square(self, x: Tensor) -> Tensor:
        return x.square().sum(-1, keepdim=True) * (0.5 * x.shape[-1] ** -0.5)


class FavorRelu(RandomFeatures):
    """Random features of a ReLU kernel; no estimate of the softmax, but bounded."""

    name = "favor_relu"

    def _features(self, q, k):
        omega = self.current()
        return self._one(q, omega), self._one(k, omega), None

    def _one(self, x: Tensor, omega: Tensor) -> Tensor:
        return F.relu(self.projected(x, omega)) * self.features**-0.5 + 1e-3


RANDOM_MAPS: dict[str, type[RandomFeatures]] = {"favor": Favor, "favor_relu": FavorRelu}


def _drawn(omega: Tensor, counters: Tensor) -> Tensor:
    seed, redraws, _ = counters.tolist()
    heads, features, width = omega.shape
    return draw(heads, features, width, seed, redraws).to(omega)


@torch.library.custom_op("longspan::favor_redraw", mutates_args=())
def favor_redraw(omega: Tensor, counters: Tensor, every: int) -> tuple[Tensor, Tensor]:
    """omega and counters after one more forward pass in training."""
    counters = counters.clone()
    # Recomputation of a block inside of a backward repeats a pass that was counted.
    if torch._C._current_graph_task_id() == -1:
        counters[2] += 1
        if int(counters[2]) % every == 0:
            counters[1] += 1
            return _drawn(omega, counters), counters
    return omega.clone(), counters


alone(favor_redraw, lambda omega, counters, every: like(omega, counters))
