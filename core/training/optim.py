"""The optimiser's parts: which weights decay, how the learning rate moves, the running mean of the weights."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import get_ema_multi_avg_fn

from core.training.sections import OptimSection


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups: matrices decay; norms, biases and other vectors do not.

    Decay pulls weights to zero, which is meant for matrices; a norm's scale or a gate per head has no reason to be
    small. Frozen parameters are left out.
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim >= 2]
    vectors = [p for p in trained if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(module: nn.Module, section: OptimSection, *, fused: bool) -> AdamW:
    """AdamW over the groups; `fused` is one kernel for all tensors (on the CPU a third of the loop's time)."""
    groups = parameter_groups(module, section.weight_decay)
    return AdamW(groups, lr=section.lr, betas=section.betas, fused=fused)


def lr_factor(step: int, total: int, section: OptimSection) -> float:
    """Share of the peak learning rate at optimiser step `step` (from 0) of `total`: linear up, then the schedule."""
    warmup = int(section.warmup) if section.warmup >= 1 else round(section.warmup * total)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if section.schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return section.min_lr_ratio + (1 - section.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def build_scheduler(optimizer: AdamW, section: OptimSection, total_steps: int) -> LambdaLR:
    """`lr_factor` as a scheduler that is stepped once per optimiser step."""
    return LambdaLR(optimizer, lambda step: lr_factor(step, total_steps, section))


class WeightAverage:
    """Exponential running mean of a module's trained parameters, kept in their dtype and on their device.

    The effective decay at update n is min(decay, (1 + n) / (10 + n)), so that the random start is forgotten at once
    (TensorFlow's ExponentialMovingAverage with num_updates).
    """

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.updates = 0
        self._parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._mean: dict[str, Tensor] = {name: p.detach().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are now."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        now = [p.detach() for p in self._parameters.values()]
        mean = [self._mean[name] for name in self._parameters]
        get_ema_multi_avg_fn(decay)(mean, now, self.updates)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the module computes with the mean; afterwards the trained weights are back, bit for bit."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        # Storage changes hands instead of numbers, so nothing is rounded and an optimiser keeps its parameters.
        for name, parameter in self._parameters.items():
            parameter.data, self._mean[name] = self._mean[name], parameter.data

    def state_dict(self) -> dict:
        """Updates seen and the mean of each parameter."""
        return {"updates": self.updates, "mean": dict(self._mean)}

    def load_state_dict(self, state: dict) -> None:
        """Continue from a `state_dict`."""
        self.updates = int(state["updates"])
        for name, mean in self._mean.items():
            mean.copy_(state["mean"][name])
