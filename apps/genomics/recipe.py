"""What a genomics recipe may say; the line under a field is its help text. No torch here."""

import re
from typing import Literal, Self

from pydantic import Field, model_validator

from apps.genomics.data_section import DataSection, Share
from apps.genomics.words import shortcut_terms
from core.attention.registry import nearest
from core.training.recipe import Recipe, Section

TaskName = Literal["classification", "multilabel", "regression", "tokens", "token_regression", "causal", "masked"]

METRICS: dict[str, dict[str, Literal["higher", "lower"]]] = {
    "classification": dict.fromkeys(("mcc", "accuracy", "balanced_accuracy", "f1_macro", "auroc", "auprc"), "higher"),
    "multilabel": dict.fromkeys(("auprc", "auroc", "f1_macro"), "higher"),
    "regression": {"spearman": "higher", "pearson": "higher", "r2": "higher", "mse": "lower", "mae": "lower"},
    "tokens": dict.fromkeys(("mcc", "accuracy", "f1_macro"), "higher"),
    "token_regression": {"pearson": "higher", "r2": "higher", "mse": "lower", "mae": "lower"},
    "causal": {"perplexity": "lower"},
    "masked": {"masked_perplexity": "lower"},
}
"""What a task may be judged by; the first is what it is judged by when the recipe does not say."""
PER_BASE = ("tokens", "token_regression")
LANGUAGE = ("causal", "masked")


class ModelSection(Section):
    """What stands around the backbone."""

    stem: list[int] = Field(default_factory=list)
    """Widths of convolutions over the letters before the backbone, such as [9, 5]."""
    strand: Literal["none", "augment", "average", "tied"] = "none"
    """Which strand is read. augment: in training either one by chance; average: that, and both in evaluation; tied:
    both always, with shared weights, so that the answer for the other strand is the mirrored answer by construction."""
    pool: Literal["mean", "max", "attend", "flat"] = "mean"
    """How a sequence becomes one vector; flat keeps every position apart and needs sequences of one length."""
    shortcut: str = "none"
    """Add a linear model, started at its closed or logistic fit. Of whole sequences, joined by +: position (letters
    in sequences of one length; position:2 pairs too), kmer:4 (shares), first:30 and last:20 (shares of letters at the
    ends), length. Else window:17 (neighbours of a base), markov:6 (causal models), neighbours:3 (masked models)."""
    shortcut_strength: float | None = Field(None, gt=0)
    """Ridge or inverse logistic strength of that fit; null: 1 for ridge, 0.01, for window 1."""
    shortcut_frozen: bool = False
    """Leave the linear model at its fit, so that the attention alone learns, and adds to it."""
    hidden_share: Share | None = None
    """Share of letters that the network, not the shortcut, is not shown in training, drawn anew each time."""
    scaled: bool = True
    """Regression targets are standardised with mean and deviation of the training part."""
    class_weights: bool = False
    """Weigh the classes of the loss by the inverse of their share."""
    mask_share: Share = 0.15
    """Share of tokens that a masked model has to fill in; in training 80 % of those are masked, 10 % replaced,
    10 % kept, in evaluation all are masked."""
    pretrained: str | None = None
    """Folder or checkpoint of a run whose embedding, stem and backbone are the start, such as runs/pretrain."""

    @model_validator(mode="after")
    def _parts_exist(self) -> Self:
        shortcut_terms(self.shortcut)
        wrong = [width for width in self.stem if width < 2 or width > 65]
        if wrong:
            raise ValueError(f"stem widths are 2 to 65 letters, got {wrong[0]}")
        return self


class PredictSection(Section):
    """What `longspan predict` does with a file; may be changed after training."""

    what: Literal["predictions", "embeddings", "token_embeddings", "mutagenesis"] = "predictions"
    """Predictions; vectors, one per sequence or one per token (.npz); or the effect of every substitution (table)."""
    reference: str | None = None
    """FASTA or GenBank that BED and VCF files point into; for mutation lists the wild type. null: data.reference."""
    context: int | None = Field(None, ge=2)
    """Bases around a variant that are scored; null: as many as the model was trained on."""
    flank: int = Field(8, ge=0)
    """Tokens beside an insertion or deletion whose likelihood a masked model compares too."""
    against: str | int | None = None
    """Column of a mutation list with measured effects: the rank correlation of the scores with it is told."""
    stream: bool = False
    """Read a sequence of any length in one pass through the state of a causal model, in constant memory."""
    chunk: int = Field(4096, ge=1)
    """Tokens per step of the pass; changes speed and memory, not the result."""
    layer: Literal["last", "input"] = "last"
    """Where embeddings are taken: after the backbone, or before it."""
    batch_size: int = Field(32, ge=1)
    """Stretches per forward pass."""
    write: Literal["probabilities", "classes"] = "probabilities"
    """Per-base classes as bedGraph or WIG: a track per class, of its probability, or of 1 where it is the likeliest."""


class GenomicsRecipe(Recipe):
    """DNA and protein: sequences in; a label, a number, a label per base, or the next letter out."""

    task: TaskName = "classification"
    """What is learned: one class, several labels or numbers per sequence; a class or number per base (tokens,
    token_regression); a language model that reads on (causal) or fills gaps (masked)."""
    metric: str | None = None
    """What picks the best epoch and is reported first; null: mcc, auprc, spearman or perplexity by the task."""
    data: DataSection = Field(default_factory=DataSection)  # type: ignore[assignment]
    """Where the sequences and their labels come from, how they are checked, and how they are cut."""
    model: ModelSection = Field(default_factory=ModelSection)  # type: ignore[assignment]
    """What stands around the backbone."""
    predict: PredictSection = Field(default_factory=PredictSection)  # type: ignore[assignment]
    """What `longspan predict` does with a file; may be changed after training."""

    def judged_by(self) -> tuple[str, Literal["lower", "higher"]]:
        """The recipe's metric, else the first of its task."""
        known = METRICS[self.task]
        name = self.metric or next(iter(known))
        return name, known[name]

    @model_validator(mode="after")
    def _task_fits(self) -> Self:
        known = METRICS[self.task]
        if self.metric is not None and self.metric not in known:
            raise ValueError(
                f"metric {self.metric!r} does not go with task={self.task}{nearest(self.metric, known)}; "
                f"known there: {', '.join(known)}"
            )
        data, model = self.data, self.model
        per_base, language = self.task in PER_BASE, self.task in LANGUAGE
        if per_base and data.tokens != "char":
            raise ValueError(f"task={self.task} has an answer per base and needs data.tokens=char, got {data.tokens}")
        if language and re.fullmatch(r"kmer:\d+(:\d+)?", data.tokens):
            k, stride = [*data.tokens.split(":"), "1"][1:3]
            if k != stride:
                raise ValueError(f"overlapping k-mers tell each other's letters; for task={self.task} say kmer:{k}:{k}")
        if model.strand != "none" and data.alphabet == "protein":
            raise ValueError(f"model.strand={model.strand}: a protein has no second strand")
        if model.strand == "tied" and self.task == "causal":
            raise ValueError("model.strand=tied would let a causal model read the future; use augment or average")
        if model.strand == "average" and self.task == "causal":
            raise ValueError(
                "model.strand=average: a causal model reads one strand at a time; say augment "
                "(variants are scored on both strands anyway)"
            )
        masks = {"lower=mask": data.lower == "mask", "mask_path": data.mask_path or data.mask_file}
        for name in (name for name, given in masks.items() if given):
            if not (language or per_base) or data.tokens != "char":
                raise ValueError(
                    f"data.{name} leaves single bases unscored: it needs an answer per base or a language model, and "
                    f"data.tokens=char; here are task={self.task} and {data.tokens}"
                )
        if language and model.strand != "none" and data.tokens != "char":
            raise ValueError(f"model.strand={model.strand} with task={self.task} needs data.tokens=char")
        fits = {"window": per_base, "markov": self.task == "causal", "neighbours": self.task == "masked"}
        for kind, _ in shortcut_terms(model.shortcut):
            if not fits.get(kind, not (per_base or language)):
                raise ValueError(f"model.shortcut={model.shortcut} does not go with task={self.task}")
            if data.tokens != "char":
                raise ValueError(f"model.shortcut={model.shortcut} reads letters and needs data.tokens=char")
            if kind in ("markov", "neighbours") and data.alphabet == "protein":
                raise ValueError(f"model.shortcut={kind} is for DNA")
        if model.shortcut_frozen and model.shortcut == "none":
            raise ValueError("model.shortcut_frozen keeps a shortcut at its fit, and model.shortcut is none")
        if model.hidden_share is not None and (language or data.tokens != "char"):
            raise ValueError("model.hidden_share hides letters: it needs data.tokens=char and no language model")
        if data.features is not None and self.task != "tokens":
            raise ValueError(f"data.features are labels per base: say task=tokens, the task is {self.task}")
        if data.packing and self.backbone.mlp == "mix":
            raise ValueError(
                "backbone.mlp=mix looks at neighbours, which in a pack may be another sequence's: say gelu"
            )
        if data.negatives != "none" and self.task != "classification":
            raise ValueError(f"data.negatives make two classes, the task is {self.task}")
        return self
