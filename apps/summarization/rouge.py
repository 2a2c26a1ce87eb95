"""ROUGE-1, 2, L and Lsum offline, with every choice that moves a figure named and printed.

    rouge1, rouge2   clipped n-gram overlap: F of precision and recall
    rougeL           longest common subsequence of the two whole texts
    rougeLsum        over reference sentences, union of subsequences with all candidate ones; depends on the splitter

Lsum is not L: they differ by 10 to 20 points. Subsequences are found with whole rows as one integer (Hyyro 2004), so
that 260 answers with four references each take seconds. The backtracking of Lsum takes the same path as the script of
google-research/rouge_score, of which this gives the figures; no line of it is used.

Source:
    Lin 2004, https://aclanthology.org/W04-1013
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

import numpy as np
from nltk.stem.porter import PorterStemmer

METRICS = ("rouge1", "rouge2", "rougeL", "rougeLsum")
TOKENS = {"ascii": re.compile(r"[a-z0-9]+"), "words": re.compile(r"\w+"), "characters": re.compile(r"\w")}
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_PORTER = PorterStemmer()


@lru_cache(maxsize=200_000)
def stem(word: str) -> str:
    """Porter's stem of a lower-case word; words of up to three letters stay, as in rouge_score."""
    return _PORTER.stem(word) if len(word) > 3 else word


@dataclass(frozen=True)
class Scorer:
    """Scores texts; its fields are the variant of ROUGE, printed by `describe`.

    Attributes:
        stemming: Porter's stems instead of words, worth 1 to 2 points of rouge1.
        tokens: "ascii": runs of [a-z0-9], the convention of published figures, to which other scripts are nothing;
            "words": runs of letters and digits of any script; "characters": single ones, for scripts without spaces.
        splitter: where Lsum ends a sentence. "punctuation": after . ! ? before white space, and at newlines;
            "newline": at newlines alone.
    """

    stemming: bool = True
    tokens: Literal["ascii", "words", "characters"] = "ascii"
    splitter: Literal["punctuation", "newline"] = "punctuation"

    def describe(self) -> str:
        """The variant in words, for reports."""
        stems = "Porter stems" if self.stemming else "no stemming"
        where = ". ! ? before white space and newlines" if self.splitter == "punctuation" else "newlines"
        return f"F x 100, {stems}, {self.tokens} tokens, Lsum split at {where}, best of several references"

    def words(self, text: str) -> list[str]:
        """Tokens as they are compared."""
        found = TOKENS[self.tokens].findall(text.lower())
        return [stem(word) for word in found] if self.stemming and self.tokens != "characters" else found

    def prepare(self, text: str) -> "Prepared":
        """A text ready to be compared with many others; PEGASUS marks "<n>" are newlines."""
        lines = text.replace("<n>", "\n").split("\n")
        if self.splitter == "punctuation":
            lines = [piece for line in lines for piece in _SENTENCE_END.split(line)]
        return Prepared([words for line in lines if (words := self.words(line))])

    def score(self, prediction: str, references: Sequence[str]) -> dict[str, float]:
        """F of each metric in 0..1 against the reference that is best for it; 0 without words.

        Raises:
            ValueError: no reference.
        """
        return best_of(self.prepare(prediction), [self.prepare(reference) for reference in references])

    def corpus(
        self, predictions: Iterable[str], references: Iterable[Sequence[str]], *, intervals: bool = False
    ) -> dict[str, float]:
        """Means x 100 over documents; with intervals also <metric>_low and _high, see `bootstrap`."""
        rows = [self.score(p, r) for p, r in zip(predictions, references, strict=True)]
        return means(rows, intervals=intervals)


@dataclass
class Prepared:
    """A tokenised text: sentences, and their n-grams once somebody asks."""

    sentences: list[list[str]]
    flat: list[str] = field(init=False)
    _grams: dict[int, Counter] = field(init=False, default_factory=dict)

    def __post_init__(self):
        self.flat = [word for sentence in self.sentences for word in sentence]

    def grams(self, n: int) -> Counter:
        """Counts of n-grams; they cross sentence borders, as in rouge_score."""
        if n not in self._grams:
            self._grams[n] = Counter(zip(*(self.flat[i:] for i in range(n)))) if n > 1 else Counter(self.flat)
        return self._grams[n]


def best_of(prediction: Prepared, references: Sequence[Prepared]) -> dict[str, float]:
    """F of each metric, the maximum over references."""
    if not references:
        raise ValueError("ROUGE needs at least one reference")
    rows = [score_pair(prediction, reference) for reference in references]
    return {metric: max(row[metric] for row in rows) for metric in METRICS}


def score_pair(prediction: Prepared, reference: Prepared) -> dict[str, float]:
    """F of all metrics for one reference."""
    return {
        "rouge1": overlap(prediction.grams(1), reference.grams(1)),
        "rouge2": overlap(prediction.grams(2), reference.grams(2)),
        "rougeL": f_measure(subsequence(prediction.flat, reference.flat), len(prediction.flat), len(reference.flat)),
        "rougeLsum": summary_level(prediction, reference),
    }


def f_measure(hits: float, predicted: float, wanted: float) -> float:
    """Harmonic mean of hits / predicted and hits / wanted; 0 where there is nothing."""
    return 2 * hits / (predicted + wanted) if hits else 0.0


def overlap(predicted: Counter, wanted: Counter) -> float:
    """F of clipped counts."""
    small, large = (predicted, wanted) if len(predicted) <= len(wanted) else (wanted, predicted)
    hits = sum(min(count, large[gram]) for gram, count in small.items() if gram in large)
    return f_measure(hits, predicted.total(), wanted.total())


def _places(words: Sequence[str]) -> dict[str, int]:
    """Bit i of a word's integer is set where the word stands at place i."""
    found: dict[str, int] = {}
    for i, word in enumerate(words):
        found[word] = found.get(word, 0) | 1 << i
    return found


def _rows(candidate: Sequence[str], places: dict[str, int], length: int) -> list[int]:
    """Row j, bit i set: the subsequence with candidate[: j + 1] grows when reference word i is added."""
    full = (1 << length) - 1
    state, rows = full, []
    for word in candidate:
        matched = state & places.get(word, 0)
        state = ((state + matched) | (state - matched)) & full
        rows.append(~state & full)
    return rows


def subsequence(candidate: Sequence[str], reference: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    rows = _rows(candidate, _places(reference), len(reference))
    return rows[-1].bit_count() if rows else 0


def _matched(candidate: Sequence[str], reference: Sequence[str], places: dict[str, int]) -> set[int]:
    """Places of the reference on the longest common subsequence that backtracking from the ends finds."""
    rows = _rows(candidate, places, len(reference))
    found = set()
    i, j = len(reference) - 1, len(candidate) - 1
    while i >= 0 and j >= 0 and rows[j]:
        if reference[i] == candidate[j]:
            found.add(i)
            i, j = i - 1, j - 1
        elif rows[j] >> i & 1:  # without word i the subsequence is shorter, so it is the candidate's word that can go
            j -= 1
        else:
            i -= 1
    return found


def summary_level(prediction: Prepared, reference: Prepared) -> float:
    """Lsum: of each reference sentence the union of its subsequences with all candidate sentences, clipped."""
    left, wanted = Counter(prediction.grams(1)), Counter(reference.grams(1))
    hits = 0
    for sentence in reference.sentences:
        places = _places(sentence)
        union: set[int] = set()
        for candidate in prediction.sentences:
            union |= _matched(candidate, sentence, places)
        for i in union:
            word = sentence[i]
            if left[word] > 0 and wanted[word] > 0:
                hits += 1
                left[word] -= 1
                wanted[word] -= 1
    return f_measure(hits, len(prediction.flat), len(reference.flat))


def means(rows: Sequence[dict[str, float]], *, intervals: bool = False) -> dict[str, float]:
    """Means x 100 of per-document scores, each metric with its interval where asked for."""
    found: dict[str, float] = {}
    for metric in rows[0] if rows else ():
        values = 100 * np.array([row[metric] for row in rows])
        found[metric] = float(values.mean())
        if intervals:
            found[f"{metric}_low"], found[f"{metric}_high"] = bootstrap(values)
    return found


def bootstrap(
    values: "np.ndarray | Sequence[float]", *, draws: int = 1000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the mean of values [N] over documents: which documents happened to be there, no more."""
    values = np.asarray(values)
    chosen = np.random.default_rng(seed).integers(0, len(values), (draws, len(values)))
    low, high = np.quantile(values[chosen].mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
