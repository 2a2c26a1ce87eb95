"""What training, validation and test do with a batch: one class per kind of answer.

SequenceTask   a class, several labels or numbers per sequence
BaseTask       a class or a number per base
LanguageTask   the next letter, or the masked ones (`language.py`)
"""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from apps.genomics.labels import UNSCORED
from apps.genomics.metrics import (
    RANKED,
    base_figures,
    confusion,
    moments,
    number_figures,
    plain_figures,
    sequence_figures,
)
from apps.genomics.model import SequenceModel, build_model
from apps.genomics.ranking import area_intervals, spearman_interval
from apps.genomics.recipe import LANGUAGE, PER_BASE, GenomicsRecipe
from apps.genomics.results import write_bases, write_sequences
from apps.genomics.strata import write_strata
from core.training.pretrained import load_pretrained
from core.training.scores import Scores, classification, regression
from core.training.task import Task

log = logging.getLogger(__name__)

HEADS = ("head", "query", "shortcut")
"""Parts of a model that belong to its task and are not taken over from a pretrained run."""


class GenomicsTask(Task):
    """What all tasks here share.

    Args:
        recipe: the resolved recipe.   spec: what `build_data` found.
    """

    model: SequenceModel
    recipe: GenomicsRecipe

    def __init__(self, recipe: GenomicsRecipe, spec: dict[str, Any]):
        super().__init__(recipe, spec)
        self.names: list[str] = spec["names"]
        self.model = build_model(recipe, spec)
        self.part = ""

    def bring_weights(self) -> None:
        """Take over the weights of the pretrained run."""
        source = self.recipe.model.pretrained
        if source is not None:
            log.info("pretrained: %s", load_pretrained(self.model, source, skip=HEADS))

    def answer(self, batch: dict[str, Any]) -> Tensor:
        """What the model says of a batch, in float32."""
        return self.model(batch["ids"], batch["mask"], batch.get("other_ids"), batch.get("other_mask")).float()

    def cost(self) -> dict[str, Any]:
        """Parameters, and FLOPs, state bytes and tokens of an item of typical length."""
        return self.model.cost(self.spec["typical"])

    def start_pass(self, part: str) -> None:
        """Forget what the last pass kept."""
        raise NotImplementedError

    def _enter(self, batch: dict[str, Any]) -> None:
        """A pass begins when the part changes; of the test part, length and GC share of every item are kept."""
        if self.part != batch["part"]:
            self.part = batch["part"]
            self.traits: list[np.ndarray] = []
            self.start_pass(self.part)
        if self.part == "test":
            self.traits.append(self.model.tokens.traits(batch["ids"].cpu().numpy(), batch["mask"].cpu().numpy()))


class SequenceTask(GenomicsTask):
    """A class, several labels, or numbers per sequence."""

    weights: Tensor | None
    mean: Tensor
    deviation: Tensor

    def __init__(self, recipe: GenomicsRecipe, spec: dict[str, Any]):
        super().__init__(recipe, spec)
        weights = class_weights(spec) if recipe.model.class_weights and recipe.task == "classification" else None
        self.register_buffer("weights", weights, persistent=False)
        register_scale(self, recipe, spec)
        self.start_pass("")

    def start_pass(self, part: str) -> None:
        """Forget what the last pass kept."""
        self.kept: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy, its mean over labels, or the squared error of standardised targets."""
        answer, target = self.answer(batch), batch["target"]
        if self.recipe.task == "classification":
            return F.cross_entropy(answer, target, weight=self.weights), {}
        if self.recipe.task == "multilabel":
            return F.binary_cross_entropy_with_logits(answer, target), {}
        return F.mse_loss(answer, (target - self.mean) / self.deviation), {}

    def predicted(self, batch: dict[str, Any]) -> Tensor:
        """Probabilities [B, K], or numbers [B, T] in the units of the file."""
        answer = self.answer(batch)
        if self.recipe.task == "classification":
            return answer.softmax(-1)
        if self.recipe.task == "multilabel":
            return answer.sigmoid()
        return answer * self.deviation + self.mean

    def eval_update(self, batch: dict[str, Any]) -> None:
        """Keep what was predicted; sequences are few enough to be kept whole."""
        self._enter(batch)
        predicted = self.predicted(batch).double().cpu().numpy()
        self.kept.append((predicted, batch["target"].cpu().numpy(), batch["index"].cpu().numpy()))

    def eval_compute(self) -> dict[str, float]:
        """Figures of the pass that ends here, with intervals over sequences for the test part."""
        predicted, target, index = (np.concatenate(part) for part in zip(*self.kept))
        self.tested = predicted, target, index
        copied = self.spec["copied"].get(self.part) if self.part else None
        flags = None if copied is None else np.isin(index, copied)
        is_test, self.part = self.part == "test", ""
        return sequence_figures(
            self.recipe.task,
            predicted,
            target,
            self.names,
            copied=flags,
            leaks=self.recipe.data.leaks,
            intervals=is_test,
        )

    def artifacts(self, run_dir: Path) -> list[Path]:
        """Predictions of the test part with ids, and plots."""
        task, (predicted, target, index) = self.recipe.task, self.tested
        files = write_sequences(run_dir, task, self.names, self.spec["test_ids"], predicted, target, index)
        left_out = self.spec["copied"].get("test", []) if self.recipe.data.leaks == "drop" else []
        rows = np.flatnonzero(~np.isin(index, left_out))
        traits = np.concatenate(self.traits)[rows]
        return files + write_strata(run_dir, traits, lambda n: plain_figures(task, predicted[rows[n]], target[rows[n]]))


class BaseTask(GenomicsTask):
    """A class or a number per base."""

    weights: Tensor | None
    mean: Tensor
    deviation: Tensor

    def __init__(self, recipe: GenomicsRecipe, spec: dict[str, Any]):
        super().__init__(recipe, spec)
        weights = class_weights(spec) if recipe.model.class_weights and recipe.task == "tokens" else None
        self.register_buffer("weights", weights, persistent=False)
        register_scale(self, recipe, spec)
        self.start_pass("")

    def start_pass(self, part: str) -> None:
        """Forget what the last pass kept."""
        self.sums: list[np.ndarray] = []
        self.kept: list[tuple[np.ndarray, np.ndarray]] = []
        self.sizes: list[np.ndarray] = []  # scored bases of each stretch that is kept
        self.bases = 0

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy or squared error over the bases that are scored."""
        answer, target = self.answer(batch), batch["target"]
        if self.recipe.task == "tokens":
            known = target != UNSCORED
            if not bool(known.any()):
                return answer.sum() * 0.0, {}
            return F.cross_entropy(answer[known], target[known], weight=self.weights), {}
        known = ~target.isnan()
        if not bool(known.any()):
            return answer.sum() * 0.0, {}
        wanted = (target[known] - self.mean) / self.deviation
        return F.mse_loss(answer[..., 0][known], wanted), {}

    def predicted(self, batch: dict[str, Any]) -> Tensor:
        """Probabilities [B, N, K], or numbers [B, N] in the units of the file."""
        answer = self.answer(batch)
        return answer.softmax(-1) if self.recipe.task == "tokens" else answer[..., 0] * self.deviation + self.mean

    def eval_update(self, batch: dict[str, Any]) -> None:
        """Count each stretch on its own, so that intervals are over stretches and not over single bases."""
        self._enter(batch)
        predicted, target = self.predicted(batch).cpu().numpy(), batch["target"].cpu().numpy()
        classes = self.recipe.task == "tokens"
        for guess, truth in zip(predicted, target):
            self.sums.append(confusion(guess.argmax(-1), truth, len(self.names)) if classes else moments(guess, truth))
        if self.part == "test" and self.bases < RANKED:
            known = target != UNSCORED if classes else ~np.isnan(target)
            self.kept.append((predicted[known], target[known]))
            self.sizes.append(known.sum(1))
            self.bases += int(known.sum())

    def eval_compute(self) -> dict[str, float]:
        """Figures of the pass that ends here."""
        is_test, self.part = self.part == "test", ""
        sums = np.stack(self.sums)
        self.tested = sums
        if self.recipe.task == "tokens":
            return base_figures(sums, is_test) | (self._ranked() if is_test else {})
        return (self._ranked() if is_test else {}) | number_figures(sums, is_test)

    def _ranked(self) -> Scores:
        """Figures that need all bases at once, where there are not too many, with intervals over stretches."""
        if self.bases >= RANKED or not self.kept:
            return {}
        predicted, target = (np.concatenate(part) for part in zip(*self.kept))
        sizes = np.concatenate(self.sizes)
        stretch = np.repeat(np.arange(len(sizes)), sizes)
        if self.recipe.task != "tokens":
            found = {"spearman": regression(predicted, target)["spearman"]}
            return found | spearman_interval(predicted, target, stretch)
        figures = classification(predicted, target)
        found = {name: figures[name] for name in ("auroc", "auprc") if name in figures}
        return found | area_intervals(predicted, target, stretch)

    def artifacts(self, run_dir: Path) -> list[Path]:
        """Plots of the bases of the test part."""
        figures = base_figures if self.recipe.task == "tokens" else number_figures

        def score(items: np.ndarray) -> Scores:
            found = figures(self.tested[items])
            return {name: found[name] for name in ("accuracy", "mcc", "pearson", "mae") if name in found}

        files = write_bases(run_dir, self.recipe.task, self.names, self.tested, self.kept)
        return files + write_strata(run_dir, np.concatenate(self.traits), score)


def class_weights(spec: dict[str, Any]) -> Tensor:
    """Inverse share of each class, with mean 1 over the training part; a class that does not occur has weight 0."""
    shares = torch.tensor(spec["shares"])
    inverse = torch.where(shares > 0, 1 / shares.clamp(min=1e-9), 0.0)
    return inverse / (inverse * shares).sum()


def register_scale(task: GenomicsTask, recipe: GenomicsRecipe, spec: dict[str, Any]) -> None:
    """Mean and deviation of regression targets as buffers; 0 and 1 where they are not scaled."""
    scaled = recipe.model.scaled and "mean" in spec
    for name, plain in (("mean", 0.0), ("deviation", 1.0)):
        task.register_buffer(name, torch.tensor(spec[name] if scaled else [plain]), persistent=False)


def build_task(recipe: GenomicsRecipe, spec: dict[str, Any]) -> GenomicsTask:
    """The task of a recipe for the data that `spec` describes.

    Raises:
        ValueError: the model cannot be built as the recipe says.
    """
    from apps.genomics.language import LanguageTask

    if recipe.task in LANGUAGE:
        return LanguageTask(recipe, spec)
    return (BaseTask if recipe.task in PER_BASE else SequenceTask)(recipe, spec)
