"""Which sentences a summary of these references would take: the greedy oracle, and the worth of single sentences.

Both see the references: the oracle is a ceiling of what choosing sentences can reach (not the true maximum, it is
greedy), and what extractive models learn from.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from apps.summarization.rouge import Prepared, Scorer

MOST_SENTENCES = 12
"""Of the oracle."""


class Hits:
    """How sentences cover the n-grams of one reference: counts [N, G] of its n-grams only, and sizes."""

    def __init__(self, sentences: Sequence[Prepared], reference: Prepared, n: int):
        grams = reference.grams(n)
        columns = {gram: i for i, gram in enumerate(grams)}
        self.wanted = np.array(list(grams.values()), dtype=np.int32)
        self.total = int(self.wanted.sum())
        self.counts = np.zeros((len(sentences), len(columns)), np.int32)
        self.sizes = np.array([max(0, len(sentence.flat) - n + 1) for sentence in sentences])
        for i, sentence in enumerate(sentences):
            own: Counter = sentence.grams(n)
            for gram in own.keys() & columns.keys():
                self.counts[i, columns[gram]] = own[gram]

    def f_with_each(self, chosen: np.ndarray, size: int) -> np.ndarray:
        """F, [N], of what is chosen (counts [G], n-grams `size`) together with each sentence."""
        hits = np.minimum(chosen + self.counts, self.wanted).sum(axis=1)
        return 2 * hits / np.maximum(size + self.sizes + self.total, 1)


def greedy_oracle(sentences: Sequence[Prepared], reference: Prepared, most: int = MOST_SENTENCES) -> list[int]:
    """Sentences added one by one while rouge1 + rouge2 grows, in the order of the document."""
    both = [Hits(sentences, reference, n) for n in (1, 2)]
    have = [np.zeros(len(hits.wanted), np.int32) for hits in both]
    size = [0, 0]
    chosen: list[int] = []
    best = 0.0
    for _ in range(most):
        value = np.sum([hits.f_with_each(have[k], size[k]) for k, hits in enumerate(both)], axis=0)
        value[chosen] = -1.0
        i = int(np.argmax(value))
        if value[i] <= best + 1e-9:
            break
        best = float(value[i])
        chosen.append(i)
        for k, hits in enumerate(both):
            have[k] += hits.counts[i]
            size[k] += int(hits.sizes[i])
    return sorted(chosen)


def oracle_labels(sentences: Sequence[Prepared], references: Sequence[Prepared]) -> np.ndarray:
    """[N] in 0..1: the share of references whose oracle takes the sentence."""
    labels = np.zeros(len(sentences), np.float32)
    for reference in references:
        labels[greedy_oracle(sentences, reference)] += 1 / len(references)
    return labels


def soft_labels(sentences: Sequence[Prepared], references: Sequence[Prepared]) -> np.ndarray:
    """[N] in 0..1: precision of unigrams and bigrams in each reference, the mean; how much of a sentence is wanted."""
    worth = np.zeros(len(sentences), np.float64)
    for reference in references:
        for n in (1, 2):
            hits = Hits(sentences, reference, n)
            worth += np.minimum(hits.counts, hits.wanted).sum(axis=1) / np.maximum(hits.sizes, 3)
    return (worth / (2 * len(references))).astype(np.float32)


def prepare_all(sentences: Sequence[str], scorer: Scorer | None = None) -> list[Prepared]:
    """Sentences ready to be compared."""
    scorer = scorer or Scorer()
    return [scorer.prepare(sentence) for sentence in sentences]
