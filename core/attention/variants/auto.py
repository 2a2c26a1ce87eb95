"""`auto`: softmax or hybrid, chosen once when the layer is built, by the length it is built for.

    softmax  where it is no slower than the hybrid: it is exact
    hybrid   beyond: time linear in the length, near keys still exact

They are different functions, so the choice never changes with the input. It is made from a measurement of this device
(`longspan bench` writes one) and else from `CROSSOVERS`, logged once, and stands in `layer.variant.chosen` and in the
state_dict. What `auto` can do is what every candidate can, so that it does not depend on the machine. Which backend
computes the chosen one is decided per call, as for every variant (`core.attention.backends`).

Weights of one choice mean nothing to the other. A recipe is therefore settled before training: the run's recipe names
the chosen variant itself and loads anywhere. Weights that were saved without a recipe refuse to load into another
choice and say which `choice=` they belong to; rebuilding in place would leave an optimizer with dead parameters.
"""

from functools import cache

import torch
from torch import Tensor

from core.attention import measurement
from core.attention.backends import log
from core.attention.contract import NO_INPUTS, Attended, Cost, Heads, State, Variant
from core.attention.registry import build, nearest, register

CANDIDATES = ("softmax", "hybrid")
LENGTH = 4096
"""The length chosen for where none is given."""

CROSSOVERS = {"cpu": 2048, "cuda": 16384}
"""Tokens from which the hybrid (window 64) is faster than softmax, forward and backward, at head width 64.

cpu: 2026-11-21 on an AMD EPYC with 2 threads and torch 2.15, causal and two-sided alike
(benchmarks/results/attention-cpu-2026-11-21.json). cuda: not measured but set high, because torch's softmax kernels are
near a GPU's peak and the hybrid's blocks are not. Other devices follow the CPU.
"""


def choose(length: int, width: int, device: str) -> tuple[str, str]:
    """The variant for this length, head width and device ("cpu", "cuda"), and the reason in words.

    Widths other than the measured one move the crossover in proportion to width + 64: linear attention costs about
    2 width + 2 chunk of softmax's keys, with chunks of 64.
    """
    known = measurement.load(device)
    wanted = [(name, kind) for name in CANDIDATES for kind in measurement.DIRECTIONS]
    if known is None or any(len(known["ms"].get(name, {}).get(kind, ())) < 2 for name, kind in wanted):
        crossover = CROSSOVERS.get(torch.device(device).type, CROSSOVERS["cpu"]) * (width + 64) / 128
        name = "softmax" if length < crossover else "hybrid"
        return name, f"built-in rule for {device}: hybrid from {crossover:.0f} tokens at head width {width}"
    alike = length * (known["width"] + 64) / (width + 64)
    times = {(name, kind): measurement.time_at(known["ms"][name][kind], alike) for name, kind in wanted}
    # Not known here: whether the layer is causal. The exact one stays until it is slower either way.
    slower = all(times["softmax", kind] > times["hybrid", kind] for kind in measurement.DIRECTIONS)
    told = ", ".join(
        f"{kind} softmax {times['softmax', kind]:.3g} ms and hybrid {times['hybrid', kind]:.3g} ms"
        for kind in measurement.DIRECTIONS
    )
    return ("hybrid" if slower else "softmax"), f"measured on {known['device']} {known['date']}: {told}"


@cache
def _say(line: str) -> None:
    log.info(line)


@register(
    "auto",
    summary="softmax or hybrid, whichever suits the length on this device; chosen once, when built",
    source="this project's rule and measurements (`longspan bench`)",
    pick="you do not want to choose, and the length is known",
    stability="that of its choice",
)
class AutoAttention(Variant):
    """The variant that suits a length on this device.

    Args:
        length: tokens to choose for; None: 4096.
        device: where it will run, "cpu" or "cuda"; None: a CUDA device if there is one.
        choice: insist on "softmax" or "hybrid", as for weights that were trained elsewhere.
    """

    can = frozenset({"causal", "bidirectional", "recurrent", "mass"})
    positions = frozenset({"rope", "alibi"})
    growth = "quadratic"

    def __init__(
        self, heads: Heads, *, length: int | None = None, device: str | None = None, choice: str | None = None
    ):
        super().__init__(heads)
        self.chosen = settle(heads.width, length=length, device=device, choice=choice)
        self.inner = build(self.chosen, heads)
        self.growth = self.inner.growth  # pyright: ignore[reportAttributeAccessIssue]

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
        return self.inner(
            q,
            k,
            v,
            causal=causal,
            key_mask=key_mask,
            rotary=rotary,
            slopes=slopes,
            dropout=dropout,
            return_mass=return_mass,
            backend=backend,
            inputs=inputs,
        )

    def init_state(self, batch: int, *, positions=None, device=None, dtype=None) -> State:
        return self.inner.init_state(batch, positions=positions, device=device, dtype=dtype)

    def resume(self, q, k, v, state: State, **options) -> tuple[Attended, State]:
        return self.inner.resume(q, k, v, state, **options)

    def cost(self, batch, length, keys=None, **options) -> Cost:
        return self.inner.cost(batch, length, keys, **options)

    def extra_repr(self) -> str:
        return f"chosen={self.chosen}"

    def get_extra_state(self) -> Tensor:
        """The chosen name as bytes: a tensor, which safetensors and torch.load(weights_only=True) take."""
        return torch.tensor(list(self.chosen.encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Refuse the weights of another choice.

        Raises:
            ValueError: they are another choice's.
        """
        theirs = bytes(state.tolist()).decode()
        if theirs != self.chosen:
            raise ValueError(
                f"these weights belong to auto's choice {theirs!r}, this layer chose {self.chosen!r}; "
                f"build it with choice={theirs!r}"
            )


def settle(width: int, *, length: int | None = None, device: str | None = None, choice: str | None = None) -> str:
    """The name that `auto` with these options stands for; logged once.

    Raises:
        ValueError: an option that cannot be.
    """
    if choice is not None and choice not in CANDIDATES:
        raise ValueError(
            f"unknown choice {choice!r} for auto{nearest(choice, CANDIDATES)}; known: {', '.join(CANDIDATES)}"
        )
    length = LENGTH if length is None else length
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise ValueError(f"length must be a whole number of tokens, at least 1, got {length!r}")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in CROSSOVERS:
        raise ValueError(f"unknown device {device!r} for auto{nearest(device, CROSSOVERS)}; known: cpu, cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("auto cannot choose for device='cuda': torch sees none; use device='cpu' or choice=")
    if choice is not None:
        return choice
    name, reason = choose(length, width, device)
    _say(f"auto attention: {name} for {length} tokens on {device} ({reason})")
    return name
