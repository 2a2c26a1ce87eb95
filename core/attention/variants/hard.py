r"""Hard attention: every query takes one value, instead of a mean of all.

    p_i = softmax_j(scale q_i.k_j)    training: c_i ~ p_i    evaluation: c_i = argmax_j p_ij, the first of equals
    o_i = v_{c_i}

The choice has no derivative. Two estimators train the scores (tau: temperature, g: Gumbel noise, whose argmax draws
from p):

    gumbel       straight-through: backward as if o_i = sum_j y_ij v_j with y_i = softmax_j((s_ij + g_ij) / tau).
                 Biased for tau > 0, noisier as tau falls: `anneal` leads it from `temperature` to `final_temperature`.
    reinforce    the score function: no gradient through the choice, but a loss that the training loop adds,
                 loss = mean_b sum_hi [-(R_b - baseline) log p_i(c_i) - entropy H(p_i)],
                 with a reward R_b per example (say, minus its task loss) and the baseline a moving average of it.
                 Unbiased, of high variance.

The second in a training loop:

    task = criterion(model(x), y)                                  # [B], one number per example
    loss = task.mean() + reinforce_loss(model, -task.detach())     # after the forward pass, before backward

Time L M, memory linear; the decoding state is the cache of keys and values. There is no mass: one key is no sum.

Source:
    Xu et al. 2015, arXiv:1502.03044 (hard attention, reinforce); Jang et al. 2017, arXiv:1611.01144 (straight-through)

Where we differ:
    Xu et al. choose one position of one image per word; here every head and query chooses. The noise is a hash of a
    counter in the state_dict and the pair's number, not the global generator: a resumed run draws what an
    uninterrupted one would, and evaluation draws nothing.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.attention.backends import implementation, resolve
from core.attention.blocked.hard import gumbel, hard_forward, numbers
from core.attention.contract import (
    NO_INPUTS,
    Attended,
    Cost,
    Heads,
    State,
    Variant,
    accumulator,
    check_inputs,
    hide,
    repeat_heads,
    visible,
)
from core.attention.positions import alibi_bias
from core.attention.registry import nearest, register
from core.attention.ring import empty_ring, extend_ring

ESTIMATORS = ("gumbel", "reinforce")
BASELINE_DECAY = 0.9


def reference(s, v, noise, temperature, straight) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The definition, dense: scores s [B, H, L, M], -inf where hidden; (out, chosen, log p(chosen), entropy)."""
    empty = (s == -torch.inf).all(-1, keepdim=True)
    noisy = s if noise is None else s + noise
    chosen = noisy.argmax(-1)
    weights = F.one_hot(chosen, s.shape[-1]).to(v.dtype).masked_fill(empty, 0.0)
    if straight:
        y = torch.softmax((noisy / temperature).masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0).to(v.dtype)
        weights = weights + (y - y.detach())
    log_p = torch.log_softmax(s.masked_fill(empty, 0.0), -1)
    log_prob = log_p.gather(-1, chosen.unsqueeze(-1)).masked_fill(empty, 0.0).squeeze(-1)
    terms = (log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).masked_fill(empty, 0.0)
    return weights @ v, chosen.masked_fill(empty.squeeze(-1), -1), log_prob, -terms.sum(-1)


@implementation("hard", "reference")
def _reference(q, k, v, key_mask, slopes, seed, temperature, causal, scale, straight, measure):
    length, keys = q.shape[2], k.shape[2]
    k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
    s = scale * q @ k.transpose(-1, -2)
    if slopes is not None:
        s = s + alibi_bias(slopes.to(q.dtype), length, keys)
    seen = visible(length, keys, causal=causal, key_mask=key_mask, device=q.device)
    noise = None
    if seed is not None:
        at = numbers(slice(0, q.shape[0]), q.shape[1], slice(0, length), keys, (length, keys), q.device)
        noise = gumbel(seed, at, accumulator(q.dtype)).to(q.dtype)
    return reference(s.masked_fill(~seen, -torch.inf), v, noise, temperature.to(q.dtype), straight)


implementation("hard", "torch")(hard_forward)


@register(
    "hard",
    summary="every query takes the value of one key; trained by straight-through Gumbel or REINFORCE; quadratic",
    source="Xu et al. 2015, arXiv:1502.03044; Jang et al. 2017, arXiv:1611.01144",
    pick="the choice itself is wanted: one source position per output",
    stability="REINFORCE is noisy (a moving baseline is kept); anneal the temperature of Gumbel",
)
class HardAttention(Variant):
    """One key per query and head: a draw in training, the best in evaluation.

    Args:
        estimator: "gumbel" or "reinforce"; the options below belong to one of them.
        temperature: tau of gumbel at the start; None: 1.
        final_temperature: tau of gumbel at the end of `anneal`; None: 0.1.
        entropy: weight of the entropy in the loss of reinforce; None: 0.01.

    Attributes:
        auxiliary: (log p(chosen), entropy), both [B, H, L], of the last training pass of reinforce; else None.
    """

    can = frozenset({"causal", "bidirectional", "cross", "recurrent"})
    positions = frozenset({"rope", "alibi"})
    growth = "quadratic"
    moving = ("draws", "auxiliary", "passes")
    draws: Tensor
    temperature: Tensor
    baseline: Tensor

    def __init__(
        self,
        heads: Heads,
        *,
        estimator: str = "gumbel",
        temperature: float | None = None,
        final_temperature: float | None = None,
        entropy: float | None = None,
    ):
        super().__init__(heads)
        if estimator not in ESTIMATORS:
            raise ValueError(
                f"unknown estimator {estimator!r}{nearest(estimator, ESTIMATORS)}; known: gumbel, reinforce"
            )
        given = {"temperature": temperature, "final_temperature": final_temperature, "entropy": entropy}
        for name, value in given.items():
            if value is not None and (name == "entropy") != (estimator == "reinforce"):
                raise ValueError(f"{name} does not belong to estimator={estimator!r}")
            if value is not None and (value < 0 or (value == 0 and name != "entropy")):
                raise ValueError(f"{name} must be positive, got {value}")
        self.estimator = estimator
        self.first = 1.0 if temperature is None else temperature
        self.last = 0.1 if final_temperature is None else final_temperature
        self.entropy = 0.01 if entropy is None else entropy
        self.register_buffer("temperature", torch.tensor(float(self.first)))
        self.register_buffer("baseline", torch.zeros(()))
        # Drawn once, like the weights, so that the heads of different layers do not share their noise.
        self.register_buffer("draws", torch.randint(2**62, ()))
        self.auxiliary: tuple[Tensor, Tensor] | None = None
        self.passes = 0

    def anneal(self, progress: float) -> None:
        """Set the temperature for a share of the training, 0 (first) to 1 (final), falling geometrically."""
        if self.estimator != "gumbel":
            raise ValueError("only estimator='gumbel' has a temperature to anneal")
        if not 0.0 <= progress <= 1.0:
            raise ValueError(f"progress is the share of training that is done, 0 to 1, got {progress}")
        self.temperature.fill_(self.first * (self.last / self.first) ** progress)

    def loss(self, reward: Tensor, rows: Tensor | None = None) -> Tensor:
        """The REINFORCE loss of the last training pass; also moves the baseline.

        Args:
            reward: [B], larger is better; taken as a constant.
            rows: bool [B, L], which queries count; None: all.

        Raises:
            ValueError: not exactly one training pass since the last call (a pack is several), or wrong shapes.
        """
        if self.estimator != "reinforce":
            raise ValueError("estimator='gumbel' trains through the output and has no loss of its own")
        if self.auxiliary is None or self.passes != 1:
            raise ValueError(f"loss follows one training pass, without packs; there were {self.passes} since the last")
        log_prob, entropy = self.auxiliary
        if reward.shape != log_prob.shape[:1]:
            raise ValueError(f"reward must be [{len(log_prob)}], one number per example, got {list(reward.shape)}")
        if rows is not None and rows.shape != (log_prob.shape[0], log_prob.shape[2]):
            raise ValueError(f"rows must be [{log_prob.shape[0]}, {log_prob.shape[2]}], got {list(rows.shape)}")
        reward = reward.detach().to(log_prob.dtype)
        advantage = (reward - self.baseline)[:, None, None]
        each = -advantage * log_prob - self.entropy * entropy
        if rows is not None:
            each = torch.where(rows[:, None], each, 0.0)
        self.baseline.lerp_(reward.mean().to(self.baseline.dtype), 1 - BASELINE_DECAY)
        self.auxiliary, self.passes = None, 0
        return each.sum((1, 2)).mean()

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
        if rotary is not None:
            q, k = rotary[0](q), rotary[1](k)
        check_inputs(q, k, v, key_mask, slopes)
        k, v = hide(k, key_mask), hide(v, key_mask)
        seed = None
        if self.training:
            seed = self.draws.clone()
            self.draws += 1
        straight = self.estimator == "gumbel"
        measure = self.training and not straight
        run = resolve("hard", backend, q.device.type, q.dtype, ()).run
        scale = q.shape[-1] ** -0.5
        temperature = self.temperature.clone()  # which may be annealed before the backward pass
        out, _, *measured = run(q, k, v, key_mask, slopes, seed, temperature, causal, scale, straight, measure)
        if measure:
            self.auxiliary, self.passes = (measured[0], measured[1]), self.passes + 1
        return Attended(out, None)

    def init_state(self, batch: int, *, positions=None, device=None, dtype=None) -> State:
        return empty_ring(self.heads, batch, 0, device, dtype)

    def resume(
        self, q, k, v, state: State, *, key_mask=None, rotary=None, slopes=None, backend="auto", inputs=NO_INPUTS
    ):
        if rotary is not None:
            q, k = rotary[0](q), rotary[1](k)
        new = extend_ring(state, k, v, key_mask)
        options = {"key_mask": new["mask"], "slopes": slopes, "backend": backend}
        return self(q, new["keys"], new["values"], causal=True, **options), new

    def cost(self, batch, length, keys=None, *, causal=False, positions=None, element_bytes=4) -> Cost:
        keys = length if keys is None else keys
        h = self.heads
        seen = (keys - (length - 1) / 2) if causal else keys  # mean over the queries, bottom-right aligned
        return Cost(
            flops=round(2 * batch * h.query * length * seen * h.width),
            bytes_moved=batch * element_bytes * (h.query * length + h.key * keys) * (h.width + h.value_width),
            state_bytes=batch * keys * (h.key * element_bytes * (h.width + h.value_width) + 1) if causal else 0,
        )

    def __getstate__(self):
        # A pass's graph can be neither copied nor pickled, and belongs to no copy.
        return {**self.__dict__, "auxiliary": None, "passes": 0}


def reinforce_loss(model: nn.Module, reward: Tensor, rows: Tensor | None = None) -> Tensor:
    """The sum of `HardAttention.loss` over all hard layers of a model that are trained by REINFORCE.

    Raises:
        ValueError: there are none.
    """
    hard = [part for part in model.modules() if isinstance(part, HardAttention) and part.estimator == "reinforce"]
    if not hard:
        raise ValueError("this model has no hard attention with estimator='reinforce'")
    return torch.stack([part.loss(reward, rows) for part in hard]).sum()
