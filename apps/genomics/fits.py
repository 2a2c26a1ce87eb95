"""The fit that a shortcut starts from: on the training part alone, with the features of the floors (`terms.py`)."""

from typing import Any

import numpy as np

from apps.genomics import linear
from apps.genomics.alphabet import Alphabet
from apps.genomics.items import Items
from apps.genomics.labels import UNSCORED
from apps.genomics.markov import Markov
from apps.genomics.neighbours import Neighbours
from apps.genomics.recipe import GenomicsRecipe
from apps.genomics.terms import feature_matrix
from apps.genomics.words import by_position, shortcut_terms
from core.training.errors import UserError
from core.training.matrices import pack

STRENGTH = 0.01
"""Inverse strength of logistic shortcuts: rather too strong than too weak, since training goes on from there."""
WINDOW_STRENGTH = 1.0
"""That of `window`, which is fitted on far more rows than it has weights."""


def fit_shortcut(
    recipe: GenomicsRecipe, alphabet: Alphabet, train: Items, names: list[str], spec: dict[str, Any]
) -> dict[str, Any] | None:
    """Words and packed weights of the recipe's shortcut; None: it wants none.

    Raises:
        UserError: position needs sequences of one length.
    """
    words = recipe.model.shortcut
    terms = shortcut_terms(words)
    if not terms:
        return None
    kind, size = terms[0]
    if kind == "markov":
        both = recipe.model.strand != "none"
        tables = Markov(train.sequences, size, alphabet, both_strands=both).tables
        return {"terms": words, "weights": pack(np.concatenate(tables))}
    if kind == "neighbours":
        return {"terms": words, "weights": pack(gapped_table(recipe, alphabet, train, size))}
    if by_position(words) and spec["fixed"] is None:
        raise UserError(f"model.shortcut={words} needs sequences of one length, and these differ; use kmer:4")
    strength = recipe.model.shortcut_strength
    if kind == "window":
        weights, bias = _window(recipe, alphabet, train, names, size, strength, spec)
    else:
        x = feature_matrix(terms, train.sequences, alphabet, recipe.model.strand != "none")
        y = np.stack([np.asarray(one) for one in train.targets or []])
        if recipe.task == "classification":
            weights, bias = linear.fit_classes(x, y, len(names), strength or STRENGTH)
        elif recipe.task == "multilabel":
            weights, bias = linear.fit_labels(x, y, strength or STRENGTH)
        else:
            weights, bias = linear.fit_numbers(x, scaled(y, recipe, spec), strength or 1.0)
    return {"terms": words, "weights": pack(weights), "bias": pack(bias)}


def gapped_table(recipe: GenomicsRecipe, alphabet: Alphabet, train: Items, side: int) -> np.ndarray:
    """Log-probabilities of the letter between neighbours of which any may be unknown, as beside a mask.

    Returns:
        [(atoms + 1)^(2 side), atoms]. Digits of a row, highest first: the left letters from far to near, then
        the right ones likewise; the digit `atoms` is unknown.
    """
    sequences = list(train.sequences)
    if recipe.model.strand != "none":
        sequences += [alphabet.reverse_complement(one) for one in sequences]
    counts = Neighbours(sequences, side, alphabet).counts
    for axis in range(2 * side):
        counts = np.concatenate([counts, counts.sum(axis, keepdims=True)], axis)
    table = counts.reshape(-1, len(alphabet.atoms)) + 1
    return np.log(table / table.sum(-1, keepdims=True))


def scaled(y: np.ndarray, recipe: GenomicsRecipe, spec: dict[str, Any]) -> np.ndarray:
    """Targets in the units that the model is trained in."""
    if not recipe.model.scaled:
        return y
    return (y - np.array(spec["mean"])) / np.array(spec["deviation"])


def _window(
    recipe: GenomicsRecipe,
    alphabet: Alphabet,
    train: Items,
    names: list[str],
    size: int,
    strength: float | None,
    spec: dict[str, Any],
) -> tuple[np.ndarray, np.ndarray]:
    flat = np.concatenate(train.targets or [])
    rows = drawn_rows(flat, recipe.task == "tokens")
    x = linear.windows(train.sequences, size, alphabet, rows)
    if recipe.task == "tokens":
        return linear.fit_classes(x, flat[rows], len(names), strength or WINDOW_STRENGTH)
    return linear.fit_numbers(x, scaled(flat[rows, None].astype(np.float64), recipe, spec), strength or 1.0)


def drawn_rows(flat: np.ndarray, classes: bool) -> np.ndarray:
    """Numbers of the scored bases, thinned evenly to `linear.ROWS`."""
    rows = np.flatnonzero(flat != UNSCORED if classes else ~np.isnan(flat))
    return rows[:: max(1, -(-len(rows) // linear.ROWS))]
