"""Markov models: what the last k letters say of the next one. Floors of language models, and their shortcut."""

from collections.abc import Sequence

import numpy as np

from apps.genomics.alphabet import Alphabet

HIGHEST = {"dna": 10, "protein": 3}
"""Orders that the floor chooses from go up to these."""


def contexts(codes: np.ndarray, order: int, atoms: int) -> tuple[np.ndarray, np.ndarray]:
    """Number of the `order` letters before each position, [L] int64, and whether they are there and all atoms."""
    ids, clean = np.zeros(len(codes), dtype=np.int64), np.ones(len(codes), dtype=bool)
    for back in range(order, 0, -1):
        before = np.full(len(codes), atoms, dtype=np.int64)
        before[back:] = codes[:-back] if back < len(codes) else before[back:]
        clean &= before < atoms
        ids = ids * atoms + np.minimum(before, atoms - 1)
    return ids, clean


def count(sequences: Sequence[np.ndarray], order: int, alphabet: Alphabet, both_strands: bool = False) -> np.ndarray:
    """How often each letter follows each context, [atoms^order, atoms] float64."""
    atoms = len(alphabet.atoms)
    total = np.zeros(atoms ** (order + 1))
    for codes in sequences:
        for one in (codes, alphabet.reverse_complement(codes)) if both_strands else (codes,):
            ids, clean = contexts(one, order, atoms)
            clean &= one < atoms
            total += np.bincount(ids[clean] * atoms + one[clean], minlength=len(total))
    return total.reshape(-1, atoms)


class Markov:
    """Probabilities of all orders up to the highest; a position with fewer letters before it uses a lower order.

    Each count is raised by one, so that nothing is impossible.
    """

    def __init__(self, sequences: Sequence[np.ndarray], order: int, alphabet: Alphabet, both_strands: bool = False):
        self.order, self.atoms = order, len(alphabet.atoms)
        # Each order is counted for itself: summing up the highest would miss letters with fewer letters before them.
        counts = [count(sequences, k, alphabet, both_strands) + 1 for k in range(order + 1)]
        self.tables = [np.log(one / one.sum(-1, keepdims=True)) for one in counts]

    def score(self, codes: np.ndarray, order: int | None = None) -> np.ndarray:
        """Log-probability of each letter [L] given those before it; 0 for an ambiguous letter, which is not asked."""
        order = self.order if order is None else order
        scores = np.zeros(len(codes))
        asked = codes < self.atoms
        letters = np.minimum(codes, self.atoms - 1)
        todo = asked.copy()
        for k in range(order, -1, -1):
            ids, clean = contexts(codes, k, self.atoms)
            now = todo & clean
            scores[now] = self.tables[k][ids[now], letters[now]]
            todo &= ~now
        return scores
