"""From a trained model to one with another attention: its weights, the gap, and learning from it layer by layer.

A recipe with `model.convert_from: RUN` builds the same model with its own `attention`, takes over every weight of RUN
except those inside the mechanisms, and then trains in two stages (section `model.distil`). In place of a run there may
be a file of timm's own weights: the source is then the stock model, with softmax. Where its classifier is for other
classes, the source has nothing to say about an image, so only its layers are learned from.

1. attention transfer, `steps` optimiser steps: the source runs on the batch, and the new attention of each layer, given
   what the source's layer was given, learns to put out what it put out. All layers learn side by side, and nothing but
   attention moves.
2. fine-tuning: the task's own loss, and `weight` times the distance to the source's answers.

Source of the recipe: Zhang et al. 2024 (LoLCATs), arXiv:2410.10254; Kasai et al. 2021 (T2R), arXiv:2103.13076.
"""

import logging
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apps.vision.detection import COST
from apps.vision.model import TimmBackbone, VisionModel
from apps.vision.recipe import DistilSection, VisionRecipe
from core.attention import Attention
from core.training.errors import UserError
from core.training.run import load_run

log = logging.getLogger(__name__)


def attention_modules(model: VisionModel) -> list[nn.Module]:
    """The attention of every layer, from first to last."""
    if isinstance(model.backbone, TimmBackbone):
        from apps.vision.timm_models import attentions

        return attentions(model.backbone.model)
    return [module for module in model.modules() if isinstance(module, Attention)]


WEIGHTS = (".safetensors", ".pth", ".pt", ".bin", ".npz")
"""Suffixes of files of timm weights; a run's checkpoint is a .ckpt."""


class Source(NamedTuple):
    """What is converted. answers: whether its head was trained for these classes, so that there is a gap to report."""

    model: VisionModel
    answers: bool


def load_source(recipe: VisionRecipe, spec: dict[str, Any]) -> Source:
    """The model of `model.convert_from`: of a run for the same classes, or timm's with the weights of a file.

    Raises:
        UserError: no such run or file, or one of another kind.
    """
    if Path(str(recipe.model.convert_from)).suffix.lower() in WEIGHTS:
        return _stock(recipe, spec)
    run = load_run(str(recipe.model.convert_from))
    if run.app.name != "vision" or run.spec["classes"] != spec["classes"] or run.spec["task"] != spec["task"]:
        raise UserError(
            f"model.convert_from: {recipe.model.convert_from} was trained for {run.spec.get('classes')} "
            f"({run.spec.get('task')}), the data has {spec['classes']} ({spec['task']})"
        )
    model = run.task.model.eval().requires_grad_(False)
    assert isinstance(model, VisionModel)
    return Source(model, answers=True)


def _stock(recipe: VisionRecipe, spec: dict[str, Any]) -> Source:
    """timm's model as it is, with softmax."""
    from apps.vision.timm_models import load_weights

    if recipe.model.timm is None:
        raise UserError(f"model.convert_from: {recipe.model.convert_from} holds weights of timm: name the model.timm")
    layout = recipe.backbone.model_copy(update={"layout": None})
    model = VisionModel(recipe.model_copy(update={"attention": {"variant": "softmax"}, "backbone": layout}), spec)
    assert isinstance(model.backbone, TimmBackbone)
    inner = model.backbone.model
    left = load_weights(inner, str(recipe.model.convert_from), key="model.convert_from")
    answers = model.head is None and not left["missing"]
    if not answers:
        log.info("the classifier is for other classes than these, so the answers of the source are not learned from")
    return Source(model.eval().requires_grad_(False), answers)


def take_over(model: VisionModel, source: VisionModel) -> list[str]:
    """Copy all weights but those inside the mechanisms; give the names of the mechanisms' own, which stay as they are.

    Raises:
        UserError: the two differ in more than attention.
    """
    own, given = model.state_dict(), source.state_dict()

    def inside(name: str) -> bool:
        return ".variant." in name

    for name in {*own, *given}:
        if inside(name):
            continue
        if name not in own or name not in given or own[name].shape != given[name].shape:
            here, there = (list(x[name].shape) if name in x else "none" for x in (own, given))
            raise UserError(
                f"model.convert_from: the models differ in more than attention: {name} is {there} there, {here} here; "
                "take backbone and model from the run's recipe.yaml"
            )
    model.load_state_dict(
        {name: x for name, x in given.items() if not inside(name) or _same(name, own, x)}, strict=False
    )
    return [name for name in own if inside(name) and not (name in given and _same(name, own, given[name]))]


def _same(name: str, own: dict[str, Tensor], x: Tensor) -> bool:
    return name in own and own[name].shape == x.shape


class Distillation:
    """The source beside the model while it learns.

    Args:
        source: what is learned from; it is not trained and not saved.   options: the recipe's section.
    """

    def __init__(self, source: Source, options: DistilSection):
        self.source, self.options = source.model, options
        self.weight = options.weight if source.answers else 0.0

    def to(self, device: torch.device) -> None:
        """Move the source."""
        self.source.to(device)

    def transfer(self, model: VisionModel, x: Tensor, real: Tensor | None) -> Tensor:
        """Mean over the layers of |new(input) - old(input)|^2 / |old(input) - its mean|^2, on images [B, C, H, W]."""
        seen: list[tuple[tuple, dict[str, Any], Tensor]] = []
        modules = attention_modules(self.source)
        hooks = [
            module.register_forward_hook(
                lambda _module, args, kwargs, output: seen.append((args, kwargs, output)), with_kwargs=True
            )
            for module in modules
        ]
        try:
            with torch.no_grad():
                self.source(x, real)
        finally:
            for hook in hooks:
                hook.remove()
        losses = []
        for old, new, (args, kwargs, output) in zip(modules, attention_modules(model), seen):
            if hasattr(old, "grid"):
                new.grid = old.grid  # type: ignore[assignment]
            mask = _key_mask(kwargs, output)
            put_out, wanted = (x.flatten(0, 1) if mask is None else x[mask] for x in (new(*args, **kwargs), output))
            spread = (wanted - wanted.mean(0)).square().mean()
            losses.append((put_out - wanted).square().mean() / spread.clamp(min=1e-12))
        return torch.stack(losses).mean()

    def distance(self, answer: Tensor, x: Tensor, real: Tensor | None, task: str) -> Tensor:
        """How far an answer is from the source's: KL of softened classes [B, K, ...], `between_boxes`, else MSE."""
        with torch.no_grad():
            wanted = self.source(x, real)
        if task == "boxes":
            return between_boxes(answer, wanted)
        if task not in ("classes", "segments"):
            return F.mse_loss(answer, wanted)
        soft = self.options.temperature
        p, q = F.log_softmax(wanted / soft, 1), F.log_softmax(answer / soft, 1)
        return soft**2 * (p.exp() * (p - q)).sum(1).mean()


def _key_mask(kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
    """Which tokens of a layer's output [B, N, D] are real, [B, N], from what the layer was given; None: all."""
    if "attn_mask" in kwargs:
        from apps.vision.timm_models import key_mask_of

        return key_mask_of(kwargs["attn_mask"], output)
    return kwargs.get("key_mask")


def between_boxes(answer: Tensor, wanted: Tensor) -> Tensor:
    """How far answers [B, N, K + 4] of a detector are from another's, token by token, per thing that the other sees.

    KL between the chances of each class, and the distance of the sides, weighed as in the set loss. The sides count as
    much as the other is sure of a class: where it sees nothing, its sides mean nothing. No pairing is needed, since
    both answer by the same tokens.
    """
    logits, chance = answer[..., :-4].float(), wanted[..., :-4].float().sigmoid()
    # Less the other's own entropy, so that equal answers are at no distance.
    entropy = F.binary_cross_entropy_with_logits(wanted[..., :-4].float(), chance, reduction="none")
    apart = F.binary_cross_entropy_with_logits(logits, chance, reduction="none") - entropy
    sure = chance.amax(-1)
    sides = (answer[..., -4:] - wanted[..., -4:]).abs().sum(-1)
    total = COST["class"] * apart.sum() + COST["sides"] * (sure * sides).sum()
    return total / sure.sum().clamp(min=1)


def untrained(recipe: VisionRecipe, spec: dict[str, Any], source: VisionModel) -> VisionModel:
    """The converted model before it learns anything: what the replacement alone costs."""
    model = VisionModel(recipe, spec).eval()
    take_over(model, source)
    return model


def source_is_there(recipe: VisionRecipe) -> bool:
    """Whether the run that was converted is still on this machine."""
    return recipe.model.convert_from is not None and Path(recipe.model.convert_from).exists()
