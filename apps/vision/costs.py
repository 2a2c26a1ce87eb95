"""What a vision model costs: parameters, FLOPs and tokens of one image, at any size and without data."""

from collections.abc import Sequence
from inspect import signature
from typing import Any

import torch
from torch import nn

from apps.vision.model import VisionModel
from apps.vision.recipe import VisionRecipe, pair
from core.attention.contract import Variant
from core.training.bench import best_ms
from core.training.costs import Sized, measure
from core.training.errors import UserError

SIDES = (224, 384, 512, 768, 1024)
"""Squares that are measured where nothing is asked for, each brought to whole patches."""


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


def sized(recipe: VisionRecipe, sizes: Sequence[str], batch: int, device: str) -> dict[str, Sized]:
    """The untrained model of a recipe at several sizes, for `longspan bench RECIPE`; its classes are made up.

    Args:
        recipe: with the attention that is measured.
        sizes: "512" or "480x640" (rows x columns); none: `SIDES`.
        batch: images per pass.   device: of model and images.

    Raises:
        UserError: a size that cannot be read, or is no multiple of the patch.
    """
    classes = recipe.data.classes or [str(n) for n in range(10)]
    where = pair(recipe.data.size)
    try:
        model = VisionModel(recipe, {"classes": classes, "size": list(where)}).to(device).eval()
    except ValueError as error:
        raise UserError(str(error)) from error
    patch, channels = model.backbone.patch, 3 if recipe.data.channels == "rgb" else 1
    chosen = [size_of(word) for word in sizes] or [(side // patch * patch,) * 2 for side in SIDES]
    for high, wide in chosen:
        if high % patch or wide % patch:
            near = "x".join(str(max(patch, round(side / patch) * patch)) for side in (high, wide))
            raise UserError(f"--sizes: {high}x{wide} does not divide into patches of {patch}; the nearest is {near}")
    chosen.sort(key=lambda size: size[0] * size[1])
    return {f"{high}x{wide}": _at(model, channels, (high, wide), batch, device) for high, wide in chosen}


def size_of(word: str) -> tuple[int, int]:
    """(rows, columns) of "512" or "480x640"."""
    parts = word.lower().split("x")
    if len(parts) > 2 or not all(part.isdigit() and int(part) for part in parts):
        raise UserError(f"--sizes: {word!r} must be a number of pixels, or rows x columns such as 480x640")
    return int(parts[0]), int(parts[-1])


def measured_at(model: VisionModel, channels: int, size: tuple[int, int]) -> dict[str, float]:
    """Tokens and GFLOPs of one image of this size, images/s one at a time, and peak MB of its forward pass."""
    device = next(model.parameters()).device.type
    training = model.training
    one = _at(model.eval(), channels, size, 1, device)
    try:
        with torch.no_grad():
            found = measure(one, device)
            ms = best_ms({"": one.make()}, device)[""]
    finally:
        model.train(training)
    return {"tokens": one.tokens, "gflops": found["gflops"], "images_per_s": 1e3 / ms, "peak_mb": found["peak_mb"]}


def _at(model: VisionModel, channels: int, size: tuple[int, int], batch: int, device: str) -> Sized:
    tokens = (size[0] // model.backbone.patch) * (size[1] // model.backbone.patch)

    def make() -> Any:
        x = torch.randn(batch, channels, *size, device=device)
        return lambda: model(x)

    return Sized(tokens, batch, make, lambda: count_cost(model, channels, size)["flops_per_item"])
