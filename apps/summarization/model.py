"""The model of a recipe: an extractor that scores sentences, or a writer that makes new ones."""

from typing import Any

from torch import nn

from apps.summarization.abstractive import Writer
from apps.summarization.chooser import Chooser
from apps.summarization.extractive import Extractor
from apps.summarization.recipe import SummarizationRecipe
from apps.summarization.tokens import Tokens
from core.attention.registry import variant_class
from core.layout import expand_layout
from core.training.recipe import build_recipe


def build_model(recipe: SummarizationRecipe, spec: dict[str, Any]) -> nn.Module:
    """An `Extractor`, a `Writer` or a `StockWriter` for the data that `spec` describes.

    Raises:
        ValueError: a combination that cannot be built.
    """
    backbone, model = recipe.backbone.model_dump(), recipe.model
    encoder = {"attention": recipe.attention, **backbone}
    if encoder["positions"] == "learned":
        raise ValueError("backbone.positions=learned has a fixed length; use sinusoidal, rope or alibi")
    if model.kind == "extractive":
        known = len(spec["vocabulary"])
        return Extractor(
            encoder,
            features=spec["features"],
            vocabulary=known + 2 if known else 0,
            word_dim=model.word_dim,
            sentence_depth=model.sentence_depth,
            query=spec["queries"] and model.query != "features",
            packed=model.packed,
        )
    writer = _writer(recipe, spec)
    if spec.get("extractor") is not None:
        writer.chooser = build_chooser(spec["extractor"])
    return writer


def build_chooser(given: dict[str, Any]) -> Chooser:
    """The extractor that `spec["extractor"]` describes, with weights as they start."""
    recipe: Any = build_recipe(given["recipe"], source=given["source"])
    extractor = build_model(recipe, given["spec"])
    assert isinstance(extractor, Extractor)
    return Chooser(extractor, given["spec"])


def _writer(recipe: SummarizationRecipe, spec: dict[str, Any]) -> nn.Module:
    backbone, model = recipe.backbone.model_dump(), recipe.model
    if model.checkpoint is not None:
        from apps.summarization.stock import build_stock  # needs the extra hf

        return build_stock(recipe, spec)
    if model.global_tokens != "none" and not takes_global(recipe):
        raise ValueError(
            f"model.global_tokens={model.global_tokens} needs attention that takes global tokens (longformer), "
            "in one layer at least"
        )
    decoder = {
        "dim": backbone["dim"],
        "depth": model.decoder_depth,
        "heads": backbone["heads"],
        "attention": model.decoder_attention,
        "cross": model.cross,
        "positions": "sinusoidal",
        **{key: backbone[key] for key in ("mlp_dim", "dropout", "qk_norm", "checkpoint")},
    }
    return Writer(
        Tokens(**spec["tokenizer"]).size,
        {"attention": recipe.attention, **backbone},
        decoder,
        reader=model.reader,
        patch=model.patch,
        sentence_depth=model.sentence_depth,
        pointer=model.pointer,
        smoothing=model.label_smoothing,
        packed=model.packed,
    )


def takes_global(recipe: SummarizationRecipe) -> bool:
    """Whether any layer of the encoder takes global tokens."""
    layers = expand_layout(recipe.attention, recipe.backbone.layout, recipe.backbone.depth)
    return any("global" in variant_class(layer["variant"]).can for layer in layers)
