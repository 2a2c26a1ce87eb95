"""What a vision model costs: parameters, FLOPs and tokens of one image."""

from inspect import signature
from typing import Any

import torch
from torch import nn

from apps.vision.model import VisionModel
from core.attention.contract import Variant


def count_cost(model: VisionModel, channels: int, size: tuple[int, int]) -> dict[str, Any]:
    """Parameters, FLOPs of a forward pass over one image (a multiply-add counts as two), and its tokens.

    Linear layers and convolutions are counted as they run; attention as its variant's `cost` says.
    """
    counted = {"flops": 0, "tokens": 0}

    patch = model.backbone.patch
    grid = (size[0] // patch, size[1] // patch)

    def weighed(module: Any, inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(module, Variant):
            q = inputs[0]
            on_grid: dict[str, Any] = {"grid": grid} if "grid" in signature(module.cost).parameters else {}
            counted["flops"] += module.cost(1, q.shape[2], **on_grid).flops
            counted["tokens"] = max(counted["tokens"], q.shape[2])
        elif isinstance(module, nn.Linear):
            counted["flops"] += 2 * module.weight.numel() * (inputs[0].numel() // inputs[0].shape[-1])
        else:
            counted["flops"] += 2 * module.weight.numel() * output.shape[2] * output.shape[3]

    kinds = (nn.Linear, nn.Conv2d, Variant)
    hooks = [module.register_forward_hook(weighed) for module in model.modules() if isinstance(module, kinds)]
    training = model.training
    try:
        weight = next(model.parameters())
        with torch.no_grad():
            model.eval()(torch.zeros(1, channels, *size, device=weight.device, dtype=weight.dtype))
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "flops_per_item": counted["flops"],
        "state_bytes": 0,
        "tokens_per_item": max(1, counted["tokens"]),
    }
