"""The recall probe: what can an attention mechanism look up again, once it has read it?

Two generated tasks, small enough for one CPU core. In both a sequence first shows pairs of a key and a value, and later
asks for the value of a key; the answer is read off at the query's own position.

    pairs    multi-query associative recall: N pairs, then every key is asked once, at gaps drawn from a power law;
             the accuracy is told by N.        k3 v7 k1 v2 k8 v4 . k1 . . k8 . k3       answers: v2, v4, v7
    needle   one marked key among other pairs, at a relative depth (0: the beginning), asked for at the very end; the
             accuracy is told by the depth.    k2 v5 !! v3 k9 v1 k4 v5 ... k6 v2 !!     answer: v3

The model is a causal `core.backbone.Encoder` of two layers, the attention in question in both. It is trained on all
levels at once, on sequences that are never seen twice, and tested on sequences of its own.

Source:
    Arora et al. 2023 (Zoology), arXiv:2312.04927, for the first task.

Where we differ:
    Zoology puts a convolution before every mixer; here every layer has one of two taps on q, k and v. Joining a value
    to the key before it is then easy for all, and what is compared is the memory. Its fillers are random tokens, ours
    a blank. Sizes are chosen so that softmax answers everything after about ten seconds on one core; a mechanism that
    learns slowly shows as one that cannot, so a figure holds for this budget (`Probe.steps`) and no other.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.backbone import Encoder
from core.layout import expand_layout

BLANK, NEEDLE, FIRST_KEY = 0, 1, 2
NOT_ASKED = -1
TEST_SEED = 1_000_000  # training seeds are small


@dataclass(frozen=True)
class Probe:
    """One task with the size of its sequences, model and training.

    Attributes:
        draw: (rows, level, probe, generator) -> tokens [rows, length] and targets [rows, length], NOT_ASKED where
            nothing is asked.
        levels: what the accuracy is told by: numbers of pairs, or depths.
        keys, values: how many there are of each; chance is 1 / values.
        rows: sequences per training step.
        taps: of the short convolution.
    """

    name: str
    draw: Callable[[int, float, "Probe", torch.Generator], tuple[Tensor, Tensor]]
    levels: tuple[float, ...]
    length: int = 80
    keys: int = 32
    values: int = 32
    dim: int = 64
    heads: int = 1
    depth: int = 2
    taps: int = 2
    steps: int = 200
    rows: int = 32
    lr: float = 1e-2


def draw_pairs(rows: int, level: float, probe: Probe, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Multi-query associative recall with `level` pairs."""
    number = int(level)
    keys = torch.rand(rows, probe.keys, generator=generator).argsort(1)[:, :number] + FIRST_KEY
    answers = torch.randint(probe.values, (rows, number), generator=generator)
    tokens = torch.full((rows, probe.length), BLANK)
    tokens[:, 0 : 2 * number : 2] = keys
    tokens[:, 1 : 2 * number : 2] = answers + FIRST_KEY + probe.keys
    law = (
        torch.arange(1, probe.length - 2 * number + 1, dtype=torch.float64) ** -0.99
    )  # Zoology's gap^(a - 1), a = 0.01
    at = torch.multinomial(law.expand(rows, -1), number, generator=generator) + 2 * number
    targets = torch.full((rows, probe.length), NOT_ASKED)
    return tokens.scatter(1, at, keys), targets.scatter(1, at, answers)


def draw_needle(rows: int, level: float, probe: Probe, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One marked key at the relative depth `level`, among pairs that are never asked for."""
    slots = (probe.length - 1) // 2
    keys = torch.randint(probe.keys, (rows, slots), generator=generator) + FIRST_KEY
    answers = torch.randint(probe.values, (rows, slots), generator=generator)
    marked = round(level * (slots - 1))
    keys[:, marked] = NEEDLE
    tokens = torch.full((rows, probe.length), BLANK)
    tokens[:, 0 : 2 * slots : 2] = keys
    tokens[:, 1 : 2 * slots : 2] = answers + FIRST_KEY + probe.keys
    tokens[:, -1] = NEEDLE
    targets = torch.full((rows, probe.length), NOT_ASKED)
    targets[:, -1] = answers[:, marked]
    return tokens, targets


PROBES = {
    "pairs": Probe("pairs", draw_pairs, levels=(4, 8, 16, 24)),
    "needle": Probe("needle", draw_needle, levels=(0.0, 0.25, 0.5, 0.75, 1.0)),
}


class Recaller(nn.Module):
    """Tokens [B, L] -> logits over values [B, L, values], by way of a causal encoder.

    Args:
        attention: as in a recipe: `{"variant": name, **options}`, or `{"layout": preset}`.
        probe: the sizes.

    Raises:
        ValueError: the attention cannot be built or is not causal.
    """

    def __init__(self, attention: Mapping[str, Any], probe: Probe):
        super().__init__()
        layers = expand_layout(attention, None, probe.depth)
        letters = {chr(ord("a") + i): {"short_conv": probe.taps, **layer} for i, layer in enumerate(layers)}
        self.embed = nn.Embedding(FIRST_KEY + probe.keys + probe.values, probe.dim)
        self.encoder = Encoder(
            probe.dim,
            probe.depth,
            probe.heads,
            letters,
            layout="".join(letters),
            causal=True,
            mlp_dim=2 * probe.dim,
        )
        self.head = nn.Linear(probe.dim, probe.values)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits at every position."""
        return self.head(self.encoder(self.embed(tokens)))


def train(attention: Mapping[str, Any], probe: Probe, seed: int = 0, device: str = "cpu") -> Recaller:
    """A model trained on all levels of the probe; the same seed gives the same model on the same machine."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Recaller(attention, probe).to(device)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=probe.lr, weight_decay=0.0)
    warmup = max(1, probe.steps // 5)
    cosine = [0.5 * (1 + math.cos(math.pi * step / probe.steps)) for step in range(probe.steps)]
    model.train()
    for step in range(probe.steps):
        level = probe.levels[int(torch.randint(len(probe.levels), (), generator=generator))]
        tokens, targets = (x.to(device) for x in probe.draw(probe.rows, level, probe, generator))
        asked = targets != NOT_ASKED
        loss = F.cross_entropy(model(tokens)[asked], targets[asked])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = probe.lr * cosine[step] * min(1.0, (step + 1) / warmup)
        optimizer.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: Recaller, probe: Probe, rows: int = 256) -> dict[float, float]:
    """Share of right answers by level, on `rows` fixed test sequences each."""
    device = next(model.parameters()).device
    found = {}
    for at, level in enumerate(probe.levels):
        generator = torch.Generator().manual_seed(TEST_SEED + at)
        tokens, targets = (x.to(device) for x in probe.draw(rows, level, probe, generator))
        asked = targets != NOT_ASKED
        found[level] = (model(tokens)[asked].argmax(-1) == targets[asked]).double().mean().item()
    return found


def measure(
    attentions: Mapping[str, Mapping[str, Any]],
    seeds: Sequence[int],
    *,
    probes: Sequence[Probe] = tuple(PROBES.values()),
    device: str = "cpu",
) -> Iterator[dict[str, Any]]:
    """Train and test every attention with every seed on every probe.

    Args:
        attentions: label -> attention as in a recipe.

    Yields:
        A row as soon as it is measured: task, variant, seed, accuracy by level, decoding state in bytes, seconds.

    Raises:
        ValueError: one of the attentions cannot be built; before anything is trained.
    """
    states = {
        (probe.name, label): Recaller(attention, probe).encoder.cost(1, probe.length).state_bytes
        for label, attention in attentions.items()
        for probe in probes
    }
    for probe in probes:
        for label, attention in attentions.items():
            for seed in seeds:
                start = time.perf_counter()
                found = accuracy(train(attention, probe, seed, device), probe)
                yield {
                    "task": probe.name,
                    "variant": label,
                    "seed": seed,
                    "accuracy": {f"{level:g}": round(value, 4) for level, value in found.items()},
                    "state_bytes": states[probe.name, label],
                    "seconds": round(time.perf_counter() - start, 1),
                }
