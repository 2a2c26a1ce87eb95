"""What is known of a sentence without learning: place, section, length, looks, centrality, likeness to the question.

Few documents want strong features: with fifty stories a network cannot find by itself that central sentences are good.
"""

import re
from collections.abc import Sequence

import numpy as np

from apps.summarization.documents import Source
from apps.summarization.graphs import lexrank, textrank, tfidf, word_counts

SECTIONS = {
    "introduction": r"introduc|motivation",
    "conclusion": r"conclu|summary|discussion|future",
    "related": r"related|previous|background|prior",
    "results": r"result|experiment|evaluation|performance|analysis",
    "method": r"method|model|approach|system|algorithm|architecture|framework",
    "back matter": r"reference|acknowledg|appendix|bibliograph",
}
NAMES = (
    "place", "end_place", "log_place", "near_start", "near_end",
    "log_words", "short", "opens_quote", "has_quote", "question", "exclaims", "capitals", "digits",
    "lexrank", "textrank", "centroid", "frequency", "rarity",
    "section_place", "section_start", "section_end", "section_number", *SECTIONS,
)  # fmt: skip
QUERY_NAMES = ("query_cosine", "query_share", "query_near", "query_around")
_QUOTES = "\"'“‘"


def sentence_features(source: Source) -> np.ndarray:
    """[N, len(NAMES)] float32, each about within -3..3; graph measures are z-scores inside the document."""
    sentences, size = source.sentences, len(source.sentences)
    at = np.arange(size)
    words = [sentence.split() for sentence in sentences]
    lengths = np.array([len(w) for w in words])
    counts, _ = word_counts(sentences)
    rows = tfidf(counts)
    centre = np.asarray(rows.mean(axis=0)).ravel()
    totals = np.maximum(np.asarray(counts.sum(axis=1)).ravel(), 1)
    share = np.asarray(counts.sum(axis=0)).ravel() / max(counts.sum(), 1)
    df = np.asarray((counts > 0).sum(axis=0)).ravel()
    idf = np.log1p(size / np.maximum(df, 1))
    columns = [
        at / max(size - 1, 1),
        1 - at / max(size - 1, 1),
        np.log1p(at) / 4,
        np.exp(-at / 5),
        np.exp(-(size - 1 - at) / 5),
        np.log1p(lengths) - 2.5,
        lengths < 5,
        [s[0] in _QUOTES for s in sentences],
        [any(q in s for q in '"“”') for s in sentences],
        [s.rstrip("\"'”’)").endswith("?") for s in sentences],
        [s.rstrip("\"'”’)").endswith("!") for s in sentences],
        [sum(w[0].isupper() for w in ws[1:]) / max(len(ws), 1) for ws in words],
        [sum(any(c.isdigit() for c in w) for w in ws) / max(len(ws), 1) for ws in words],
        standard(lexrank(sentences)),
        standard(textrank(sentences)),
        standard(rows @ centre),
        standard(np.asarray(counts @ share).ravel() / totals),
        standard(np.asarray(counts @ idf).ravel() / totals),
        *_section_columns(source),
    ]
    return np.stack([np.asarray(column, dtype=np.float32) for column in columns], axis=1).clip(-4, 4)


def query_features(sentences: Sequence[str], query: str | None) -> np.ndarray:
    """[N, len(QUERY_NAMES)]: likeness of each sentence, and of its neighbours, to the question; 0 without one."""
    size = len(sentences)
    if not query:
        return np.zeros((size, len(QUERY_NAMES)), np.float32)
    counts, _ = word_counts([*sentences, query])
    rows = tfidf(counts)
    cosine = np.asarray((rows[:size] @ rows[size].T).todense()).ravel()
    asked = (counts[size] > 0).toarray().ravel()
    shared = np.asarray((counts[:size] > 0) @ asked).ravel() / max(asked.sum(), 1)
    padded = np.pad(cosine, 5)
    near = np.max([padded[5 + d : 5 + d + size] for d in (-2, -1, 0, 1, 2)], axis=0)
    around = np.mean([padded[5 + d : 5 + d + size] for d in range(-5, 6)], axis=0)
    return np.stack([standard(c) for c in (cosine, shared, near, around)], axis=1).astype(np.float32).clip(-4, 4)


def standard(values: np.ndarray) -> np.ndarray:
    """Minus the mean, by the deviation; 0 where all are equal."""
    values = np.asarray(values, dtype=np.float64)
    return (values - values.mean()) / (values.std() + 1e-9) if np.ptp(values) > 1e-12 else np.zeros_like(values)


def _section_columns(source: Source) -> list[np.ndarray]:
    sections = np.array(source.sections)
    starts = np.searchsorted(sections, sections, side="left")  # sections are in order
    sizes = np.searchsorted(sections, sections, side="right") - starts
    inside = np.arange(len(sections)) - starts
    titles = [title.lower() for title in source.titles]
    return [
        inside / np.maximum(sizes - 1, 1),
        np.exp(-inside / 2.0),
        np.exp(-(sizes - 1 - inside) / 2.0),
        sections / max(len(titles), 1),
        *(np.array([bool(re.search(p, t)) for t in titles], np.float32)[sections] for p in SECTIONS.values()),
    ]
