"""Which record, or which stretch of a record, belongs to the training, validation and test part."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from apps.genomics.alphabet import Alphabet
from apps.genomics.data_section import DataSection
from apps.genomics.kmers import clusters
from apps.genomics.records import Record
from core.training.errors import UserError

PARTS = ("train", "val", "test")
SPELLED = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
"""How files call the parts."""
FEW = 10
"""Fewer sequences than this are chromosomes rather than examples."""


class Span(NamedTuple):
    """Bases [start, stop) of a record."""

    record: int
    start: int
    stop: int


def split_records(
    records: Sequence[Record], codes: Sequence[np.ndarray], options: DataSection, alphabet: Alphabet
) -> dict[str, list[Span]]:
    """Cut one source into parts by `data.split`. Identical sequences never come into two parts of a random split.

    Raises:
        UserError: a part stays empty, or the file does not say what the split needs.
    """
    if options.split == "positions":
        return _by_position(codes, options)
    if options.split == "given":
        parts = _given(records)
        if len(parts["val"]) == 0:
            taken = _drawn(_groups(records, codes, options, alphabet, "random")[parts["train"]], options)
            chosen = taken < options.val_share
            parts["val"] = parts["train"][chosen]
            parts["train"] = parts["train"][~chosen]
    else:
        groups = _groups(records, codes, options, alphabet, options.split)
        drawn = _drawn(groups, options)
        if options.split == "folds":
            in_test = (drawn * options.folds).astype(int) == options.fold
            # What is left of the interval is stretched, so that validation takes its share of the whole.
            again = _drawn(groups, options, 1)
            in_val = ~in_test & (again < options.val_share / (1 - 1 / options.folds))
        else:
            in_test = drawn < options.test_share
            in_val = ~in_test & (drawn < options.test_share + options.val_share)
        numbers = np.arange(len(records))
        parts = {"train": numbers[~in_test & ~in_val], "val": numbers[in_val], "test": numbers[in_test]}
    _not_empty({part: len(chosen) for part, chosen in parts.items()}, options)
    return {part: [Span(int(n), 0, len(codes[n])) for n in chosen] for part, chosen in parts.items()}


def set_aside(
    records: Sequence[Record], codes: Sequence[np.ndarray], options: DataSection, alphabet: Alphabet
) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the records that stay in training, and of those that become validation, when files give the rest."""
    rule = options.split if options.split in ("group", "cluster") else "random"
    chosen = _drawn(_groups(records, codes, options, alphabet, rule), options) < options.val_share
    numbers = np.arange(len(records))
    _not_empty({"train": int((~chosen).sum()), "val": int(chosen.sum())}, options)
    return numbers[~chosen], numbers[chosen]


def _groups(
    records: Sequence[Record], codes: Sequence[np.ndarray], options: DataSection, alphabet: Alphabet, rule: str
) -> np.ndarray:
    """A number per record; records with the same number stay together."""
    if rule == "cluster":
        return clusters(codes, alphabet, options.identity)
    if rule == "group":
        for record in records:
            if not record.group:
                raise UserError(
                    f"{record.where}: split=group needs a group for every record (data.group or data.header)"
                )
        names = [record.group for record in records]
    else:
        names = [record.origin or _canonical(one, alphabet) for record, one in zip(records, codes)]
    first: dict[object, int] = {}
    return np.array([first.setdefault(name, len(first)) for name in names])


def _canonical(codes: np.ndarray, alphabet: Alphabet) -> bytes:
    text = codes.tobytes()
    return text if alphabet.complement is None else min(text, alphabet.reverse_complement(codes).tobytes())


def _drawn(groups: np.ndarray, options: DataSection, stream: int = 0) -> np.ndarray:
    """A number in [0, 1) per record, alike within a group, spread evenly over the records."""
    found, inverse, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    order = np.random.default_rng([options.split_seed, stream]).permutation(len(found))
    middle = np.empty(len(found))
    filled = np.cumsum(sizes[order])
    middle[order] = (filled - sizes[order] / 2) / len(groups)
    return middle[inverse]


def _given(records: Sequence[Record]) -> dict[str, np.ndarray]:
    found: dict[str, list[int]] = {part: [] for part in PARTS}
    for number, record in enumerate(records):
        said = (record.split or "").strip().lower()
        if said not in SPELLED:
            raise UserError(
                f"{record.where}: its part is {record.split!r}, it must be train, val or test; "
                "say data.split_column or a group split in data.header"
            )
        found[SPELLED[said]].append(number)
    return {part: np.array(numbers, dtype=int) for part, numbers in found.items()}


def _by_position(codes: Sequence[np.ndarray], options: DataSection) -> dict[str, list[Span]]:
    parts: dict[str, list[Span]] = {part: [] for part in PARTS}
    for number, one in enumerate(codes):
        test = round(len(one) * (1 - options.test_share))
        val = round(len(one) * (1 - options.test_share - options.val_share))
        for part, start, stop in (("train", 0, val), ("val", val, test), ("test", test, len(one))):
            if stop > start:
                parts[part].append(Span(number, start, stop))
    _not_empty({part: len(spans) for part, spans in parts.items()}, options)
    return parts


def _not_empty(counts: dict[str, int], options: DataSection) -> None:
    for part, count in counts.items():
        if count == 0 and not (part == "test" and options.split == "given"):
            have = ", ".join(f"{name} {number}" for name, number in counts.items())
            few = sum(counts.values()) < FEW and options.split != "positions"
            how = "say data.split=positions to cut each sequence, or change the shares" if few else "change the shares"
            raise UserError(f"split={options.split} leaves the {part} part without a sequence ({have}); {how}")
