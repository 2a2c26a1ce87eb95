"""The letters on both sides say what stands between: the floor of masked language models."""

from collections.abc import Sequence

import numpy as np

from apps.genomics.alphabet import Alphabet
from apps.genomics.markov import contexts


class Neighbours:
    """Counts of the letter between `side` letters on the left and as many on the right, each raised by one.

    Where a side is not whole (ends, ambiguous letters) the letter's own share is used. Being asked about all letters
    with all others known, it has an easier task than a masked model: a strict floor.
    """

    def __init__(self, sequences: Sequence[np.ndarray], side: int, alphabet: Alphabet):
        self.side, self.atoms = side, len(alphabet.atoms)
        counts = np.zeros(self.atoms ** (2 * side + 1))
        alone = np.zeros(self.atoms)
        for codes in sequences:
            ids, clean = self.around(codes)
            asked = codes < self.atoms
            counts += np.bincount((ids * self.atoms + codes)[clean & asked], minlength=len(counts))
            alone += np.bincount(codes[asked], minlength=self.atoms)
        self.counts = counts.reshape((self.atoms,) * (2 * side + 1))
        table = counts.reshape(-1, self.atoms) + 1
        self.table = np.log(table / table.sum(-1, keepdims=True))
        self.alone = np.log((alone + 1) / (alone + 1).sum())

    def score(self, codes: np.ndarray) -> np.ndarray:
        """Log-probability of each letter [L]; 0 for an ambiguous one."""
        ids, clean = self.around(codes)
        letters = np.minimum(codes, self.atoms - 1)
        scores = np.where(clean, self.table[np.where(clean, ids, 0), letters], self.alone[letters])
        return np.where(codes < self.atoms, scores, 0.0)

    def around(self, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Number of the letters around each position, [L] int64, and whether they are all there and atoms."""
        left, ok_left = contexts(codes, self.side, self.atoms)
        right, ok_right = contexts(codes[::-1], self.side, self.atoms)
        return left * self.atoms**self.side + right[::-1], ok_left & ok_right[::-1]
