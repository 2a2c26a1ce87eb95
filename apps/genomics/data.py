"""From a recipe to training, validation and test items, with everything that was found on the way."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from apps.genomics.alphabet import ALPHABETS, Alphabet
from apps.genomics.coding import make_items, unmasked
from apps.genomics.features import class_names, mirrored
from apps.genomics.fits import fit_shortcut
from apps.genomics.items import Items
from apps.genomics.labels import UNSCORED, encode_label, find_names
from apps.genomics.leaks import find_leaks
from apps.genomics.parts import Part, read_parts
from apps.genomics.recipe import LANGUAGE, PER_BASE, GenomicsRecipe
from apps.genomics.records import Record
from apps.genomics.summary import counts, split_rule
from apps.genomics.tokens import Tokens, learn_tokens
from core.training.data import Data
from core.training.errors import UserError
from core.training.run import run_checkpoint

READING = (
    *("format", "alphabet", "columns", "sequence", "id", "header", "reference", "width", "sites", "duplicate_ids"),
    "min_quality",
)
"""Options of `data` that say how a file is read; `predict` reads the next file in the same way."""


def build_data(recipe: GenomicsRecipe) -> Data:
    """Read or make the sequences, check them, cut them into parts and into what the model sees at once.

    Raises:
        UserError: one line for any mistake in the files, or between the files and the recipe.
    """
    options, alphabet = recipe.data, ALPHABETS[recipe.data.alphabet]
    notes: dict[str, Any] = {}
    parts, source = read_parts(recipe, alphabet, notes)
    if options.validate_on == "nothing" and "val" in parts:
        aside = parts.pop("val")
        parts["train"] = (parts["train"][0] + aside[0], parts["train"][1] + aside[1])
    names = _names(recipe, parts["train"][0])
    summary: dict[str, Any] = {"source": source, "task": recipe.task, **notes, "split": split_rule(options)}
    if recipe.task in ("classification", "multilabel", "tokens"):
        summary["classes"] = names
    tokens = _tokens(recipe, alphabet, parts["train"][1])
    copied = _check_leaks(recipe, parts, alphabet, summary)

    items = {}
    for part, (records, codes) in parts.items():
        targets = None
        if options.lower == "mask":
            for record in records:
                record.scored = unmasked(record)
        if recipe.task not in LANGUAGE:
            targets = [encode_label(recipe.task, record, names) for record in records]
        items[part] = make_items(recipe, tokens, records, codes, part, targets=targets, copied=copied.get(part))
    train = items["train"]
    sizes = {part: sorted(found.lengths) for part, found in items.items()}
    lengths = {length for found in items.values() for length in found.lengths}
    spec: dict[str, Any] = {
        "names": names,
        "tokens": tokens.to_spec(),
        "fixed": lengths.pop() if len(lengths) == 1 and recipe.task not in (*PER_BASE, *LANGUAGE) else None,
        "longest": max(max(size) for size in sizes.values() if size),
        "typical": sizes["train"][len(sizes["train"]) // 2],
        "mirror": mirrored(names) if recipe.task == "tokens" and alphabet.complement is not None else None,
        "reading": {name: getattr(options, name) for name in READING},
        "copied": {part: np.flatnonzero(flags).tolist() for part, flags in copied.items() if flags.any()},
        "test_ids": [place[0] for place in items["test"].places] if "test" in items else [],
        **_statistics(recipe, train, names),
    }
    shortcut = fit_shortcut(recipe, alphabet, train, names, spec)
    if shortcut is not None:
        spec["shortcut"] = shortcut
    summary |= counts(parts, items, recipe, names)
    lengthwise = train.lengths if len(set(train.lengths)) > 1 and not options.packing else None
    test = items.get("test")
    return Data(train, items.get("val"), test, spec=spec, summary=summary, lengths=lengthwise)


def _names(recipe: GenomicsRecipe, train: Sequence[Record]) -> list[str]:
    options = recipe.data
    if recipe.task in LANGUAGE:
        return []
    if options.features is not None:
        return class_names(options.features, options.feature_labels)
    columns = options.label if isinstance(options.label, list) else None
    if recipe.task == "regression" and isinstance(options.label, str):
        columns = [options.label]
    return find_names(recipe.task, train, columns)


def _tokens(recipe: GenomicsRecipe, alphabet: Alphabet, train: Sequence[np.ndarray]) -> Tokens:
    """Tokens of the recipe; a model that goes on from another run reads as that run did."""
    if recipe.model.pretrained is None or not Path(recipe.model.pretrained).expanduser().exists():
        return learn_tokens(alphabet, recipe.data.tokens, train)
    before = run_checkpoint(recipe.model.pretrained)[2]["longspan"]
    if before["app"] != "genomics":
        raise UserError(f"model.pretrained={recipe.model.pretrained} is a run of {before['app']}, not of genomics")
    theirs = before["spec"]["tokens"]
    if (theirs["alphabet"], theirs["word"]) != (alphabet.name, recipe.data.tokens):
        raise UserError(
            f"model.pretrained={recipe.model.pretrained} reads {theirs['alphabet']} as {theirs['word']}; "
            f"say data.alphabet={theirs['alphabet']} data.tokens={theirs['word']}"
        )
    return Tokens.from_spec(theirs)


def _check_leaks(
    recipe: GenomicsRecipe, parts: dict[str, Part], alphabet: Alphabet, summary: dict[str, Any]
) -> dict[str, np.ndarray]:
    """Look for copies of training sequences in the other parts; say so, and act as `data.leaks` says."""
    options = recipe.data
    if options.leaks == "off" or options.split == "positions":
        summary["leaks"] = "not looked for" if options.leaks == "off" else "parts are stretches of the same records"
        return {}
    copied, told = {}, {}
    for part in ("val", "test"):
        if part in parts:
            # The validation part chooses the epoch, and floors are fitted with it: for the test both are seen.
            seen = parts["train"][1] + (parts["val"][1] if part == "test" and "val" in parts else [])
            leaks = find_leaks(seen, parts[part][1], alphabet, options.identity)
            copied[part], told[part] = leaks.copied, leaks.told()
            if options.leaks == "refuse" and leaks.copied.any():
                first = parts[part][0][int(leaks.copied.argmax())]
                raise UserError(
                    f"{int(leaks.copied.sum())} sequences of the {part} part have a copy in the training part, "
                    f"the first is {first.where}; say data.leaks=drop to leave them out, or warn to go on"
                )
    summary["leaks"] = told
    return copied


def _statistics(recipe: GenomicsRecipe, train: Items, names: list[str]) -> dict[str, Any]:
    """What the loss needs to know of the training targets: mean and deviation, or the share of each class."""
    if recipe.task in LANGUAGE:
        return {}
    assert train.targets is not None
    if recipe.task in ("regression", "token_regression"):
        values = np.concatenate([np.asarray(one, dtype=np.float64).reshape(-1, len(names)) for one in train.targets])
        known = ~np.isnan(values)
        if not known.any(axis=0).all():
            raise UserError("a target has no value in the training part")
        mean, deviation = np.nanmean(values, axis=0), np.nanstd(values, axis=0)
        return {"mean": mean.tolist(), "deviation": np.where(deviation > 0, deviation, 1.0).tolist()}
    if recipe.task == "multilabel":
        return {"shares": np.mean(train.targets, axis=0).tolist()}
    flat = np.concatenate([np.atleast_1d(one) for one in train.targets])
    counts = np.bincount(flat[flat != UNSCORED], minlength=len(names))
    return {"shares": (counts / counts.sum()).tolist()}
