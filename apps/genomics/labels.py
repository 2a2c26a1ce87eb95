"""From what a file says of a record to numbers: classes, several labels, numbers, classes or numbers per base."""

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from apps.genomics.records import Record
from core.attention.registry import nearest
from core.training.errors import UserError

UNSCORED = -1
MANY = 1000
"""More classes than this are numbers that were meant as targets."""


def find_names(task: str, records: Sequence[Record], columns: list[str] | None) -> list[str]:
    """Names of the classes, labels or targets of a training part.

    Args:
        columns: the label columns, if the recipe lists several.

    Raises:
        UserError: a record without a label, one class only, or far too many.
    """
    for record in records:
        if record.label is None or (isinstance(record.label, str) and not record.label.strip()):
            raise UserError(f"{record.where}: it has no label; say where labels are (data.label, data.header, ...)")
    if task in ("regression", "token_regression"):
        return columns or ["value"]
    if task == "multilabel":
        found = columns or sorted({name for record in records for name in _listed(record.label)})
    elif task == "tokens":
        found = sorted({letter for record in records for letter in record.label})
    else:
        found = sorted({str(record.label) for record in records}, key=_number_first)
    if len(found) < 2 and task != "multilabel":
        raise UserError(f"task={task} needs at least two classes, the training part has {', '.join(map(repr, found))}")
    if len(found) > MANY:
        raise UserError(f"{len(found)} different labels; for numbers say task=regression")
    return [str(name) for name in found]


def encode_label(task: str, record: Record, names: Sequence[str]) -> Any:
    """The target of a record: class (int), float32 [T], multi-hot [K], classes [L] (-1: not scored) or float32 [L].

    Raises:
        UserError: an unknown class, a number that is none, or as many labels per base as there are not bases.
    """
    label = record.label
    if task == "classification":
        return _class(str(label), names, record.where)
    if task == "multilabel":
        return _multi_hot(label, names, record.where)
    if task == "regression":
        values = label if isinstance(label, list) else [label]
        return np.array([_number(value, record.where) for value in values], dtype=np.float32)
    if isinstance(label, str):
        values = list(label) if task == "tokens" else re.split(r"[\s,;]+", label.strip())
    else:
        values = label
    if len(values) != len(record.sequence):
        what = "letters" if task == "tokens" else "numbers"
        raise UserError(f"{record.where}: {len(record.sequence)} letters of sequence, {len(values)} {what} of labels")
    if task == "tokens":
        if isinstance(values, np.ndarray):
            codes = values.astype(np.int16)
        else:
            known = {name: code for code, name in enumerate(names)}
            missing = set(values) - set(known)
            if missing:
                raise UserError(f"{record.where}: unknown label {min(missing)!r}; known: {', '.join(names)}")
            codes = np.array([known[value] for value in values], dtype=np.int16)
        return codes if record.scored is None else np.where(record.scored, codes, UNSCORED).astype(np.int16)
    numbers = np.array([_number(value, record.where, hole=True) for value in values], dtype=np.float32)
    return numbers if record.scored is None else np.where(record.scored, numbers, np.nan).astype(np.float32)


def _class(label: str, names: Sequence[str], where: str) -> int:
    if label not in names:
        raise UserError(f"{where}: unknown label {label!r}{nearest(label, names)}; known: {', '.join(names[:20])}")
    return list(names).index(label)


def _multi_hot(label: Any, names: Sequence[str], where: str) -> np.ndarray:
    target = np.zeros(len(names), dtype=np.float32)
    if isinstance(label, list):  # a column per label
        for at, value in enumerate(label):
            number = _number(value, where)
            if number not in (0, 1):
                raise UserError(f"{where}: label {names[at]!r} must be 0 or 1, got {value!r}")
            target[at] = number
        return target
    for name in _listed(label):
        target[_class(name, names, where)] = 1
    return target


def _listed(label: Any) -> list[str]:
    """Labels of one cell, as in "nucleus;membrane"; "-" and nothing mean none."""
    if isinstance(label, list):
        return [str(one) for one in label]
    return [one.strip() for one in re.split(r"[;|,]", str(label)) if one.strip() not in ("", "-")]


def _number(value: Any, where: str, hole: bool = False) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: the target must be a number, got {value!r}") from error
    if not math.isfinite(number) and not (hole and math.isnan(number)):
        raise UserError(f"{where}: the target must be a finite number, got {value!r}")
    return number


def _number_first(text: str) -> tuple:
    try:
        return (0, float(text), text)
    except ValueError:
        return (1, 0.0, text)
