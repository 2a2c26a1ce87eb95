"""Centrality of sentences in the graph of their likeness: TextRank, LexRank and what both are made of.

Sources:
    Erkan and Radev 2004 (LexRank), https://doi.org/10.1613/jair.1523
    Mihalcea and Tarau 2004 (TextRank), https://aclanthology.org/W04-3252
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix, diags

from apps.summarization.rouge import Scorer

DAMPING = 0.85
STEPS = 60
TOLERANCE = 1e-6
_WORDS = Scorer(stemming=True, tokens="words")


def word_counts(sentences: Sequence[str]) -> tuple[Any, dict[str, int]]:
    """Counts of stems, [N, V] sparse, and the column of each stem."""
    columns: dict[str, int] = {}
    rows, places = [], []
    for i, sentence in enumerate(sentences):
        for word in _WORDS.words(sentence):
            rows.append(i)
            places.append(columns.setdefault(word, len(columns)))
    shape = (len(sentences), max(1, len(columns)))
    counts: Any = csr_matrix((np.ones(len(rows), np.float32), (rows, places)), shape=shape)
    counts.sum_duplicates()
    return counts, columns


def tfidf(counts: Any) -> Any:
    """Rows of counts times log(1 + N / df), of length 1; empty rows stay 0."""
    df = np.asarray((counts > 0).sum(axis=0)).ravel()
    weighted: Any = (counts @ diags(np.log1p(counts.shape[0] / np.maximum(df, 1)))).tocsr()
    norms = np.sqrt(np.asarray(weighted.multiply(weighted).sum(axis=1)).ravel())
    return (diags(1 / np.where(norms > 0, norms, 1)) @ weighted).tocsr()  # type: ignore


def likeness(sentences: Sequence[str]) -> np.ndarray:
    """Cosine of TF-IDF rows, [N, N] dense: 4 N^2 bytes, for some thousand sentences at most."""
    rows = tfidf(word_counts(sentences)[0])
    return np.asarray((rows @ rows.T).todense(), dtype=np.float32)


def lexrank(sentences: Sequence[str]) -> np.ndarray:
    """Stationary distribution of a walk between sentences of like words (cosine of TF-IDF, no threshold), [N]."""
    rows = tfidf(word_counts(sentences)[0])
    # The graph is rows @ rows.T less its diagonal: never made, so that long documents cost no N^2.
    own = np.asarray(rows.multiply(rows).sum(axis=1)).ravel()

    def spread(weights: np.ndarray) -> np.ndarray:
        return rows @ (rows.T @ weights) - own * weights

    return _walk(spread, len(sentences))


def textrank(sentences: Sequence[str]) -> np.ndarray:
    """The same walk with likeness (shared words) / (log |a| + log |b|), words of half of all sentences left out."""
    counts, _ = word_counts(sentences)
    seen = (counts > 0).astype(np.float32).tocsr()
    df = np.asarray(seen.sum(axis=0)).ravel()
    sizes = np.asarray(counts.sum(axis=1)).ravel()
    kept = seen[:, df < 0.5 * len(sentences)].tocsr()
    logs = np.log(np.maximum(sizes, 1))
    graph = (kept @ kept.T).tocoo()
    total = logs[graph.row] + logs[graph.col]
    off = (graph.row != graph.col) & (total > 0)
    weights: Any = csr_matrix((graph.data[off] / total[off], (graph.row[off], graph.col[off])), shape=graph.shape)
    return _walk(lambda x: weights @ x, len(sentences))


def _walk(spread: Callable[[np.ndarray], np.ndarray], size: int) -> np.ndarray:
    """Power iteration of p = (1 - d) / N + d W^T (p / degree) for a symmetric W; isolated sentences jump anywhere."""
    degree = spread(np.ones(size))
    linked = degree > 1e-9
    inverse = np.where(linked, 1 / np.where(linked, degree, 1), 0.0)
    p = np.full(size, 1 / max(size, 1))
    for _ in range(STEPS):
        lost = p[~linked].sum() / size
        new = (1 - DAMPING) / size + DAMPING * (spread(p * inverse) + lost)
        if np.abs(new - p).sum() < TOLERANCE:
            return new
        p = new
    return p
