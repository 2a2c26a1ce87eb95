"""Which sentences become the summary: best first, within a budget, without saying a thing twice.

Model and floors have one rule, so that they differ in their scores alone: sentences of fewer than three words do not
count, a sentence that would pass 1.1 times the budget of words is skipped, selection stops at the budget, and the
summary is in the order of the document.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEAST_WORDS = 3
SLACK = 1.1


@dataclass(frozen=True)
class Budget:
    """words to aim at, and most sentences; None: no such bound. With neither, three sentences.

    redundancy: lambda of maximal marginal relevance, 0 (off) to 1.
    """

    words: int | None = None
    sentences: int | None = None
    redundancy: float = 0.0

    @property
    def most(self) -> int | None:
        """Most sentences."""
        return 3 if self.words is None and self.sentences is None else self.sentences


def lengths_of(sentences: Sequence[str]) -> np.ndarray:
    """Words by white space, [N]."""
    return np.array([len(sentence.split()) for sentence in sentences], dtype=np.int64)


def select(scores: np.ndarray, lengths: np.ndarray, budget: Budget, likeness: np.ndarray | None = None) -> list[int]:
    r"""Numbers of the chosen sentences in the order of the document.

    With redundancy \(\lambda\) the next sentence is the one with the largest \((1-\lambda) s_i - \lambda \max_{j \in C}
    \cos_{ij}\), scores being scaled to 0..1 in the document (Carbonell and Goldstein 1998).

    Args:
        scores: [N], larger is better; equal ones in the order of the document.
        lengths: [N] words.
        budget: what fits.
        likeness: [N, N] in 0..1; needed where the budget has redundancy.

    Returns:
        At least one sentence: where none fits the shortest of at least three words, else the best.
    """
    candidates = np.flatnonzero(lengths >= LEAST_WORDS)
    if not len(candidates):
        return [int(np.argmax(scores))] if len(scores) else []
    chosen: list[int] = []
    used = 0
    order = candidates[np.argsort(-scores[candidates], kind="stable")]
    scaled = np.zeros_like(scores, dtype=np.float64)
    if budget.redundancy:
        inside = scores[candidates].astype(np.float64)
        scaled[candidates] = (inside - inside.min()) / max(np.ptp(inside), 1e-12)
    said = np.zeros(len(scores))
    left = list(order)
    while left:
        if budget.redundancy:
            rest = np.array(left)
            at = int(np.argmax((1 - budget.redundancy) * scaled[rest] - budget.redundancy * said[rest]))
        else:
            at = 0
        i = int(left.pop(at))
        if budget.words is not None and used + lengths[i] > SLACK * budget.words:
            continue
        chosen.append(i)
        used += int(lengths[i])
        if budget.redundancy and likeness is not None:
            said = np.maximum(said, likeness[i])
        if (budget.words is not None and used >= budget.words) or len(chosen) == budget.most:
            break
    return sorted(chosen) or [int(candidates[np.argmin(lengths[candidates])])]
