"""K-mers of sequences: counts for linear models, and sketches that tell which sequences are nearly the same."""

from collections.abc import Sequence

import numpy as np

from apps.genomics.alphabet import Alphabet

SKETCH = 64
"""K-mers kept of each sequence: those with the smallest hashes, so that two copies keep the same ones."""
WORD = {"dna": 12, "protein": 5}
"""Letters of the k-mers that are compared: so many that two unrelated sequences share hardly one."""
FOLLOWED = 20
"""Sequences remembered per k-mer; low-complexity stretches stand in thousands."""


def kmer_ids(codes: np.ndarray, k: int, atoms: int) -> tuple[np.ndarray, np.ndarray]:
    """Number of the k-mer that starts at each position, [L - k + 1] int64, and whether it holds atoms alone."""
    count = len(codes) - k + 1
    if count <= 0:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=bool)
    ids, clean = np.zeros(count, dtype=np.int64), np.ones(count, dtype=bool)
    for at in range(k):
        part = codes[at : at + count]
        ids = ids * atoms + np.minimum(part, atoms - 1)
        clean &= part < atoms
    return ids, clean


def sketch(codes: np.ndarray, alphabet: Alphabet) -> np.ndarray:
    """At most `SKETCH` hashed k-mers of a sequence, alike for both strands of DNA; sorted."""
    k, atoms = min(WORD[alphabet.name], max(1, len(codes))), len(alphabet.atoms)
    ids, clean = kmer_ids(codes, k, atoms)
    if alphabet.complement is not None:
        other, _ = kmer_ids(alphabet.reverse_complement(codes), k, atoms)
        ids = np.minimum(ids, other[::-1])
    mixed = ids[clean].astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)  # wraps round: that is the hash
    return np.unique(mixed ^ (mixed >> np.uint64(29)))[:SKETCH]


class Index:
    """Finds, among the sequences added so far, one that shares a given part of its k-mers with a new one.

    An estimate: sketches stand for sequences, and of the sequences that hold a frequent k-mer only the first
    `FOLLOWED` are remembered.
    """

    def __init__(self):
        self.holders: dict[int, list[int]] = {}
        self.sizes: dict[int, int] = {}

    def add(self, number: int, words: np.ndarray) -> None:
        """Remember sequence `number`."""
        self.sizes[number] = len(words)
        for word in words.tolist():
            held = self.holders.setdefault(word, [])
            if len(held) < FOLLOWED:
                held.append(number)

    def similar(self, words: np.ndarray, share: float) -> list[int]:
        """Sequences that have at least `share` of the smaller sketch in common with these words."""
        counts: dict[int, int] = {}
        for word in words.tolist():
            for number in self.holders.get(word, ()):
                counts[number] = counts.get(number, 0) + 1
        return [n for n, count in counts.items() if count >= share * max(1, min(len(words), self.sizes[n]))]


def clusters(sequences: Sequence[np.ndarray], alphabet: Alphabet, share: float) -> np.ndarray:
    """Number of the cluster of each sequence: chains of sequences that share k-mers are one cluster."""
    parent = list(range(len(sequences)))

    def root(at: int) -> int:
        while parent[at] != at:
            parent[at] = parent[parent[at]]
            at = parent[at]
        return at

    index = Index()
    for number, codes in enumerate(sequences):
        words = sketch(codes, alphabet)
        for other in index.similar(words, share):
            parent[root(number)] = root(other)
        index.add(number, words)
    return np.array([root(number) for number in range(len(sequences))])
