"""What training, validation and test do with a batch of images."""

import logging
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from apps.vision.augment import Mixing
from apps.vision.boxes import frame_of, seen, unseen
from apps.vision.convert import Distillation, load_source, source_is_there, take_over, untrained
from apps.vision.costs import count_cost, measured_at
from apps.vision.detection import BoxScores, best, set_loss
from apps.vision.drawings import draw_strip
from apps.vision.images import BORDER, normalised, restored
from apps.vision.metrics import ClassScores, SegmentScores, ValueScores
from apps.vision.model import TimmBackbone, VisionModel
from apps.vision.native import bordered, mirrored, native_size, without_border
from apps.vision.pictures import Kept
from apps.vision.recipe import VisionRecipe, pair
from apps.vision.results import sizes_of_test, write_results
from apps.vision.views import Seen, look_at
from core.training.errors import UserError
from core.training.evaluation import autocast
from core.training.pretrained import load_pretrained, read_weights
from core.training.task import Task

log = logging.getLogger(__name__)

BORDERED = ("pad", "native")
"""Values of data.resize with which images of a batch have borders, which the model must not see."""
MOST_OVERLAYS = 8
"""Test images whose masks are drawn."""


class VisionTask(Task):
    """Classification, segmentation, dense regression of images, or boxes in them.

    Args:
        recipe: the resolved recipe.   spec: what `build_data` found: classes, size, mean and deviation.
    """

    model: VisionModel
    recipe: VisionRecipe
    mean: Tensor
    std: Tensor
    weights: Tensor | None

    def __init__(self, recipe: VisionRecipe, spec: dict[str, Any]):
        super().__init__(recipe, spec)
        self.model = VisionModel(recipe, spec)
        patch = self.model.backbone.patch
        for name, sizes in (
            ("model.eval_sizes", recipe.model.eval_sizes),
            ("augment.sizes", recipe.augment.sizes or []),
        ):
            for size in map(pair, sizes):
                if size[0] % patch or size[1] % patch:
                    near = [max(patch, round(side / patch) * patch) for side in size]
                    raise ValueError(
                        f"{name}: {list(size)} does not divide into patches of {patch}; the nearest is {near}"
                    )
        self.kind: str = spec["task"]
        self.register_buffer("mean", torch.tensor(spec["mean"]), persistent=False)
        self.register_buffer("std", torch.tensor(spec["std"]), persistent=False)
        self.register_buffer("weights", _weights(spec["counts"], recipe.model.class_balance), persistent=False)
        self.native: bool = recipe.data.resize == "native"
        mixing = self.kind == "classes"
        self.mixing = Mixing(recipe.augment, len(spec["classes"]), native=self.native) if mixing else None
        self.eraser = None
        if recipe.augment.erasing:
            from timm.data.random_erasing import RandomErasing

            self.eraser = RandomErasing(recipe.augment.erasing, mode="pixel", device="cpu")
        sizes = [pair(size) for size in recipe.augment.sizes or []]
        self.sizes = [*sizes, pair(recipe.data.size)] if sizes and sizes[-1] != pair(recipe.data.size) else sizes
        self.distillation: list[Distillation] = []  # in a list, so that it is no part of the module
        self.compared: dict[str, VisionModel] | None = None
        self.scores: dict[str, Any] = {}
        self.tested: dict[str, Any] = {}
        self.kept: list[Kept] = []
        self.first: Seen | None = None
        self.part = ""
        self.counted: dict[str, Any] | None = None

    # -- weights to start from -------------------------------------------------------------------------------------

    def bring_weights(self) -> None:
        """Take over stock weights, those of a pretrained run, or those of the run that is converted."""
        options = self.recipe.model
        if options.weights is not None:
            from apps.vision.timm_models import load_weights

            assert isinstance(self.model.backbone, TimmBackbone)
            log.info("timm weights: %s", load_weights(self.model.backbone.model, options.weights))
        if options.pretrained is not None:
            given, own = read_weights(options.pretrained), self.model.state_dict()
            heads = ("head.", "texture.project.", "backbone.model.head.")  # one for other classes starts anew
            skip = [n for n in own if n.startswith(heads) and n in given and given[n].shape != own[n].shape]
            log.info("pretrained: %s", load_pretrained(self.model, options.pretrained, skip=skip))
        if options.convert_from is not None:
            new = take_over(self.model, load_source(self.recipe, self.spec).model)
            log.info("converted from %s; of the mechanisms' own: %s", options.convert_from, ", ".join(new) or "nothing")

    def setup(self, stage: str | None = None) -> None:
        """Before training begins or goes on: the run that a conversion learns from.

        Raises:
            UserError: it is not there or does not fit.
        """
        if self.recipe.model.convert_from is not None:
            self.distillation = [Distillation(load_source(self.recipe, self.spec), self.recipe.model.distil)]

    # -- training --------------------------------------------------------------------------------------------------

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy, binary cross-entropy, squared error or set loss of a batch; what is learned from a source."""
        x, real = self._inputs(batch)
        target: Any = next(batch[name] for name in ("label", "mask", "boxes") if name in batch)
        if self.eraser is not None:
            self.eraser.device = str(x.device)
            for images in without_border(x, real) if self.native and real is not None else [x]:
                self.eraser(images)  # in place
        if self.mixing is not None:
            x, target = self.mixing(x, target, real)
        x, target, real = self._progressive(x, target, real)
        learned = self.distillation[0] if self.distillation else None
        if learned is not None:
            learned.to(x.device)
            if self.global_step < learned.options.steps:
                transfer = learned.transfer(self.model, x, real)
                return transfer, {"transfer": transfer}
        answer = self.model(x, real)
        if self.kind == "boxes":
            loss, terms = set_loss(answer, target)
        else:
            loss, terms = self._supervised(answer, target), {}
        if learned is None or not learned.weight:
            return loss, terms
        distance = learned.distance(answer, x, real, self.kind)
        return loss + learned.weight * distance, {"task_loss": loss, "distance": distance}

    def _inputs(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """(normalised images, real rows and columns where some have a border)."""
        x = normalised(batch["image"], self.mean, self.std)
        cropped = self.recipe.data.resize == "pad" and self.recipe.augment.crop is not None and self.training
        return x, None if cropped or self.recipe.data.resize not in BORDERED else batch["real"]

    def _supervised(self, answer: Tensor, target: Tensor) -> Tensor:
        if self.kind == "classes":
            weights = None if self.weights is None else self.weights.to(answer.dtype)
            return F.cross_entropy(answer, target, weight=weights)
        if self.kind == "labels":
            return F.binary_cross_entropy_with_logits(answer, target, pos_weight=self.weights)
        if self.kind == "segments":
            ignore = self.recipe.data.ignore
            target = target if ignore is None else target.masked_fill(target == ignore, BORDER)
            return F.cross_entropy(answer, target, weight=self.weights, ignore_index=BORDER)
        valid = ~target.isnan()
        return (answer[:, 0] - target)[valid].square().mean()

    def _progressive(self, x: Tensor, target: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """The batch at the size of this share of the steps."""
        if not self.sizes:
            return x, target, real
        stage = min(len(self.sizes) - 1, self.global_step * len(self.sizes) // max(1, self.total_steps))
        size = self.sizes[stage]
        if size == pair(self.recipe.data.size):
            return x, target, real
        if self.native and real is not None:
            patch = self.model.backbone.patch
            shapes = [native_size((rows, columns), size, patch) for rows, columns in real.tolist()]
            images = [_at(one[None], shape)[0] for one, shape in zip(without_border(x, real), shapes)]
            return bordered(images), target, torch.tensor(shapes, device=real.device)
        if real is not None:
            before, after = (torch.tensor(shape, device=real.device) for shape in (x.shape[2:], size))
            real = (real * after + before - 1) // before
        x = _at(x, size)
        if self.kind in ("segments", "values"):
            target = F.interpolate(target[:, None].float(), size=size, mode="nearest-exact")[:, 0].to(target.dtype)
        return x, target, real

    def configure_optimizers(self) -> Any:
        """As in every app; with `optim.layer_decay` the layers below learn more slowly, by timm's grouping."""
        configured = super().configure_optimizers()
        decay = self.recipe.optim.layer_decay
        if decay == 1.0:
            return configured
        from timm.optim import param_groups_layer_decay  # pyright: ignore[reportPrivateImportUsage]

        from core.training.optim import build_scheduler

        section = self.recipe.optim
        groups = param_groups_layer_decay(self.model, section.weight_decay, layer_decay=decay)
        for group in groups:
            group["lr"] = section.lr * group.pop("lr_scale")
        optimizer = torch.optim.AdamW(groups, lr=section.lr, betas=section.betas)
        scheduler = build_scheduler(optimizer, section, self.total_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # -- evaluation ------------------------------------------------------------------------------------------------

    def eval_update(self, batch: dict[str, Any]) -> None:
        """Add a batch to the sums; of the test part also at other sizes, and of the source of a conversion."""
        if not self.scores:
            self.kept, self.part = [], batch["part"]
        x, real = self._inputs(batch)
        if not self.scores and self.part == "test":
            rows, columns = batch["real"][0].tolist() if self.native else x.shape[2:]  # alone, it needs no border
            limits = None if real is None or self.native else real[:1]
            self.first = look_at(self.model, batch["image"][0, :, :rows, :columns], x[:1, :, :rows, :columns], limits)
        answer = self._score("", self.model, x, real, batch)
        if batch["part"] == "test":
            self._keep(batch, answer)
            for name, (images, shown) in batch.get("sizes", {}).items():
                shown = shown if self.recipe.data.resize in BORDERED else None
                self._score(name, self.model, normalised(images, self.mean, self.std), shown, batch)
            for name, model in self._others().items():
                self._score(name, model.to(x.device), x, real, batch)

    def eval_compute(self) -> dict[str, float]:
        """Metrics of the pass that ends here; those of other sizes and models have their names in front."""
        found: dict[str, float] = {}
        primary = (self.recipe.judged_by() or ("accuracy", "higher"))[0]
        for name, scores in self.scores.items():
            values = scores.compute(intervals=self.part == "test" and not name)
            found |= values if not name else {f"{name}_{primary}": values[primary]}
        self.tested, self.scores = self.scores, {}
        return found

    def answer(self, x: Tensor, real: Tensor | None = None, *, flips: bool = False) -> Tensor:
        """Logits of normalised images, [B, K] or [B, K, H, W]; flips: mean with those of the mirror images."""
        found = self.model(x, real).float()
        if not flips:
            return found
        other = self.model(mirrored(x, real), real).float()
        return (found + (other if found.dim() == 2 else mirrored(other, real))) / 2

    def boxes(self, answer: Tensor, shape: tuple[int, int], size: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Classes, scores and sides (shares of an image of `shape`) of one image's answer, from a model of `size`."""
        kinds, scores, sides = best(answer)
        options = self.recipe.data
        return kinds, scores, unseen(sides, frame_of(shape, tuple(size), options.resize, options.crop_ratio))

    def cost(self) -> dict[str, Any]:
        """Parameters, FLOPs and tokens of one image at data.size."""
        if self.counted is None:
            sizes = {pair(size) for size in (*self.recipe.model.eval_sizes, *(self.recipe.augment.sizes or []))}
            trained = pair(self.recipe.data.size)
            try:  # at every size that will be asked for, so that what cannot be shows before training
                for size in (*sorted(sizes - {trained}), trained):
                    self.counted = count_cost(self.model, len(self.spec["mean"]), size)
            except ValueError as error:
                raise UserError(f"{self.recipe.source}: {size[0]} x {size[1]} pixels: {error}") from error
            assert self.counted is not None
        return self.counted

    def artifacts(self, run_dir: Path) -> list[Path]:
        """Tables and plots of the test pass: by class, confusion, calibration, by size, masks, a look inside."""
        channels = len(self.spec["mean"])
        with autocast(self.recipe, self.device):
            costs = {size: measured_at(self.model, channels, size) for size in sizes_of_test(self.recipe)}
        files = write_results(run_dir, self.spec, self.recipe, self.tested, self.kept, costs)
        if self.first is not None:
            try:  # on the CPU, where rows are tested and gradients of one image find room
                self.model.cpu()
                files.append(draw_strip(run_dir / "inside.png", self.model, self.first))
            except RuntimeError as error:  # the figures of a long run are worth more
                log.warning("no inside.png: %s", str(error).splitlines()[0])
            finally:
                self.model.to(self.device)
        return files

    def _score(self, name: str, model: VisionModel, x: Tensor, real: Tensor | None, batch: dict[str, Any]) -> Tensor:
        answer = model(x, real).float()
        if name not in self.scores:
            self.scores[name] = self._new_scores(outlines=self.part == "test" and not name)
        if self.kind in ("classes", "labels"):
            self.scores[name].update(answer, batch["label"])
            return answer
        if self.kind == "boxes":
            found = [self.boxes(one, *given) for one, given in zip(answer, zip(batch["shape"], [x.shape[2:]] * len(x)))]
            for one, boxes in zip(found, batch["boxes"]):
                self.scores[name].update(*one, boxes)
            return found  # type: ignore[return-value]
        answers, options = [], self.recipe.data
        for one, mask in zip(answer, batch["mask"]):
            grown = restored(one, mask.shape, options.resize, options.crop_ratio)
            grown = grown.argmax(0) if self.kind == "segments" else grown[0]
            self.scores[name].update(grown, mask)
            answers.append(grown)
        return answers  # type: ignore[return-value]

    def _new_scores(self, *, outlines: bool) -> Any:
        if self.kind in ("classes", "labels"):
            return ClassScores(self.kind == "classes")
        if self.kind == "segments":
            return SegmentScores(self.spec["classes"], self.recipe.data.ignore, outlines=outlines)
        if self.kind == "boxes":
            return BoxScores(self.spec["classes"], self.recipe.predict.threshold)
        return ValueScores()

    def _others(self) -> dict[str, VisionModel]:
        """The source of a conversion and the model right after the replacement, while the source is there."""
        if self.compared is not None:
            return self.compared
        self.compared = {}
        if self.recipe.model.convert_from is None:
            return {}
        if not source_is_there(self.recipe):
            log.info("%s is gone, so the conversion is not compared with it", self.recipe.model.convert_from)
            return {}
        source = load_source(self.recipe, self.spec)
        if source.answers:
            self.compared = {"source": source.model, "replaced": untrained(self.recipe, self.spec, source.model)}
        return self.compared

    def _keep(self, batch: dict[str, Any], answer: Any) -> None:
        if self.kind in ("classes", "labels"):
            return
        room = MOST_OVERLAYS - len(self.kept)
        if self.kind != "boxes":
            for image, mask, found in zip(batch["image"][:room], batch["mask"], answer):
                self.kept.append(Kept(image.cpu(), mask.cpu(), found.cpu()))
            return
        options = self.recipe.data
        for image, boxes, shape, found in zip(batch["image"][:room], batch["boxes"], batch["shape"], answer):
            frame = frame_of(shape, image.shape[1:], options.resize, options.crop_ratio)
            sure = found[1] >= self.recipe.predict.threshold
            kinds, scores, sides = (x[sure].cpu() for x in found)
            shown = seen(torch.cat((kinds[:, None].float(), sides), 1), frame)[:, 1:]
            self.kept.append(Kept(image.cpu(), seen(boxes.cpu(), frame), (kinds, scores, shown)))


def _at(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size=size, mode="bilinear", antialias=True, align_corners=False)


def _weights(counts: list[int], power: float) -> Tensor | None:
    """Weights of the classes, 1 on average over what is seen."""
    if not power or not counts:
        return None
    share = torch.tensor(counts, dtype=torch.float32).clamp(min=1)
    share = share / share.sum()
    weights = share**-power
    return weights / (weights * share).sum()


def build_task(recipe: VisionRecipe, spec: dict[str, Any]) -> VisionTask:
    """The task of a recipe for the data that `spec` describes.

    Raises:
        ValueError: the model cannot be built as the recipe says.
    """
    return VisionTask(recipe, spec)
