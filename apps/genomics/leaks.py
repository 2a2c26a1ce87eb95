"""The leak check: which sequences of a part have a copy in the training part, exact, on the other strand, or nearly."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from apps.genomics.alphabet import Alphabet
from apps.genomics.kmers import Index, sketch

MOST = 60_000
"""More sequences than this are not compared by k-mers, only exactly; the summary says so."""


@dataclass
class Leaks:
    """What was found for the sequences of one part.

    exact, reversed_: bool [N], the same letters in the training part, or those of the other strand.
    near: bool [N], a training sequence that shares most k-mers, those of the first two left out; None: not looked for.
    """

    exact: np.ndarray
    reversed_: np.ndarray
    near: np.ndarray | None

    @property
    def copied(self) -> np.ndarray:
        """bool [N], exact copies on either strand."""
        return self.exact | self.reversed_

    def told(self) -> dict[str, object]:
        """Counts for the summary."""
        near = int(self.near.sum()) if self.near is not None else f"not looked for (more than {MOST} sequences)"
        return {"exact": int(self.exact.sum()), "reverse complement": int(self.reversed_.sum()), "near": near}


def find_leaks(train: Sequence[np.ndarray], part: Sequence[np.ndarray], alphabet: Alphabet, identity: float) -> Leaks:
    """Compare a part with the training part.

    Args:
        train, part: codes of the sequences.
        identity: share of k-mers from which on two sequences are near copies, see `kmers.Index`.
    """
    known = {codes.tobytes() for codes in train}
    exact = np.array([codes.tobytes() in known for codes in part], dtype=bool)
    turned = np.zeros(len(part), dtype=bool)
    if alphabet.complement is not None:
        turned = (
            np.array([alphabet.reverse_complement(codes).tobytes() in known for codes in part], dtype=bool) & ~exact
        )
    if len(train) + len(part) > MOST:
        return Leaks(exact, turned, None)
    index = Index()
    for number, codes in enumerate(train):
        index.add(number, sketch(codes, alphabet))
    near = np.array(
        [
            not (same or other) and bool(index.similar(sketch(codes, alphabet), identity))
            for codes, same, other in zip(part, exact, turned)
        ],
        dtype=bool,
    )
    return Leaks(exact, turned, near)
