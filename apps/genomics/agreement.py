"""Scores of variants beside effects that were measured in the laboratory."""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from apps.genomics.variants import Variant
from core.attention.registry import nearest
from core.training.errors import UserError
from core.training.scores import Scores, regression

FIRST = ("llr", "distance")
"""Which score is compared, if there is one of this name; else the first there is."""


def agreement(
    variants: Sequence[Variant], scores: dict[int, dict[str, float]], column: str, *, protein: bool = False
) -> tuple[str, Scores]:
    """How well scores follow a column of the table that the variants stand in.

    Args:
        variants: those of a mutation list, with the cells of their rows.
        scores: by the id() of a variant; those that are not scored are left out, and so are rows without a number.
        column: of the measured effects.
        protein: also tell the floor, how well the table BLOSUM62 alone follows them.

    Returns:
        Name of the score, and spearman with its interval over variants, `variants`, how many were compared, and for
        proteins `blosum62`, the spearman of that table.

    Raises:
        UserError: there is no such column, a cell of it is no number, or fewer than three rows have both.
    """
    pairs, compared, name = [], [], ""
    for variant in variants:
        if column not in variant.row:
            known = ", ".join(variant.row) or "none, it is no table"
            raise UserError(
                f"{variant.where}: predict.against={column}: no such column{nearest(column, variant.row)}; has {known}"
            )
        try:
            measured = float(variant.row[column] or "nan")
        except ValueError:
            raise UserError(f"{variant.where}: column {column} must be a number, got {variant.row[column]!r}") from None
        score = scores.get(id(variant))
        if score is None or math.isnan(measured):
            continue
        name = name or next((one for one in FIRST if one in score), next(iter(score)))
        if name in score:
            pairs.append((score[name], measured))
            compared.append(variant)
    if len(pairs) < 3:
        raise UserError(f"predict.against={column}: {len(pairs)} variants have a score and a number there, need 3")
    said, measured_all = np.array(pairs).T
    whole = regression(said, measured_all, intervals=True)
    found = {key: whole[key] for key in ("spearman", "spearman_low", "spearman_high")}
    if protein:
        found["blosum62"] = regression(np.array([_blosum62(one) for one in compared]), measured_all)["spearman"]
    return name, found | {"variants": float(len(pairs))}


def _blosum62(variant: Variant) -> float:
    return float(sum(_table()[old, new] for _, old, new in variant.changes))


@cache
def _table() -> Any:
    from Bio.Align import substitution_matrices

    return substitution_matrices.load("BLOSUM62")
