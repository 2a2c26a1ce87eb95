"""What is told of the data before training: how many, how long, how much padding, by which rule they were split."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from apps.genomics.data_section import DataSection
from apps.genomics.items import Items
from apps.genomics.packing import attention_padding
from apps.genomics.parts import Part
from apps.genomics.recipe import GenomicsRecipe
from core.training.data import EpochOrder, padding_share


def counts(parts: dict[str, Part], items: dict[str, Items], recipe: GenomicsRecipe, names: list[str]) -> dict[str, Any]:
    """Numbers of sequences, bases and stretches, how long they are, and how much of a batch is padding."""
    found: dict[str, Any] = {
        "sequences": {part: len(records) for part, (records, _) in parts.items()},
        "bases": {part: sum(map(len, codes)) for part, (_, codes) in parts.items()},
    }
    train = items["train"]
    if len(train) != len(train.sequences):
        found["stretches"] = {part: len(one) for part, one in items.items()}
    lengths = sorted(train.lengths)
    found["tokens per item"] = f"{lengths[0]} to {lengths[-1]}, half of them up to {lengths[len(lengths) // 2]}"
    if recipe.data.crop != "error" and recipe.data.length is not None:
        kept = {part: one.letters if one.letters is not None else one.sequences for part, one in items.items()}
        pairs = [(len(a), len(b)) for part, (_, codes) in parts.items() for a, b in zip(codes, kept[part])]
        lost, whole = sum(a - b for a, b in pairs), sum(a for a, _ in pairs)
        found["cropped"] = f"{sum(a > b for a, b in pairs)} sequences, {lost / whole:.1%} of the bases"
    if recipe.task == "classification":
        for part in items:
            labels = np.bincount(np.array(items[part].targets), minlength=len(names))
            found.setdefault("items per class", {})[part] = dict(zip(names, labels.tolist()))
    if lengths[0] != lengths[-1]:
        found["padding"] = _padding(recipe, train)
    return found


def _padding(recipe: GenomicsRecipe, train: Items) -> str:
    """How much of the first epoch's batches is padding, as they are and as they might be."""
    size, seed = recipe.trainer.batch_size, recipe.seed

    def batches(lengths: Sequence[int] | None) -> list[list[int]]:
        return [chosen.tolist() for chosen in EpochOrder(len(train), size, seed, lengths=lengths).batches()]

    drawn, alike = batches(None), batches(train.lengths)
    regardless, sorted_ = padding_share(train.lengths, drawn), padding_share(train.lengths, alike)
    if recipe.data.packing:
        inside = attention_padding(train.lengths, drawn)
        return (
            f"packed: none outside attention, {inside:.1%} inside (in rows {regardless:.1%}, "
            f"in batches of similar lengths {sorted_:.1%})"
        )
    return f"{sorted_:.1%} of a batch of similar lengths ({regardless:.1%} if drawn regardless)"


def split_rule(options: DataSection) -> str:
    """How the parts were made, in words."""
    if options.generated is not None or options.split == "given":
        return "given"
    if options.train is not None or (options.path is None and options.test_file is not None):
        rest = "" if options.val is not None else f", {options.val_share:.0%} of the training file for validation"
        return f"files{rest}"
    if options.split == "folds":
        return f"fold {options.fold} of {options.folds} is the test part"
    return f"{options.split}, {options.val_share:.0%} validation, {options.test_share:.0%} test"
