"""Floors: summaries without a deep model, and the ceiling of choosing sentences. Every report prints them.

- lead: the beginning;     random: sentences by chance;
- textrank, lexrank: the most central sentences of the graph of their likeness;
- optimum: sentences chosen greedily with the references in hand, up to 12 of them. A ceiling for extracts, not a floor;
  who writes new sentences may pass it. For generated data it is the best possible summary, and the greedy choice is
  called oracle.

The floors keep the budget of words of the recipe (`predict.words`).
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from apps.summarization.documents import Example, Source
from apps.summarization.graphs import lexrank, textrank
from apps.summarization.oracle import greedy_oracle, prepare_all
from apps.summarization.recipe import SummarizationRecipe
from apps.summarization.rouge import Scorer, best_of, means
from apps.summarization.selection import Budget, lengths_of, select
from core.training.data import Data

RANDOM_SEED = 0


def budget_of(recipe: SummarizationRecipe, spec: dict[str, Any]) -> Budget:
    """The recipe's budget; without one, as many words as the middle training summary has."""
    asked = recipe.predict
    words = asked.words
    if words is None and asked.sentences is None:
        words = spec["reference_words"]
    return Budget(words, asked.sentences, asked.redundancy)


def plain_budget(budget: Budget) -> Budget:
    """The same without redundancy control, which the floors do not have."""
    return Budget(budget.words, budget.sentences)


def lead_scores(source: Source) -> np.ndarray:
    """The earlier the better, [N]."""
    return -np.arange(len(source.sentences), dtype=np.float64)


def random_scores(source: Source) -> np.ndarray:
    """By chance, the same for the same document, [N]."""
    seed = [RANDOM_SEED, *source.id.encode()]
    return np.random.default_rng(seed).random(len(source.sentences))


SCORES: dict[str, Callable[[Source], np.ndarray]] = {
    "lead": lead_scores,
    "random": random_scores,
    "textrank": lambda source: textrank(source.sentences),
    "lexrank": lambda source: lexrank(source.sentences),
}


def choose(name: str, source: Source, budget: Budget) -> list[int]:
    """Sentences that the floor `name` takes."""
    return select(SCORES[name](source), lengths_of(source.sentences), plain_budget(budget))


def oracle_choice(example: Example, scorer: Scorer) -> list[int]:
    """The best by rouge1 + rouge2 of the greedy choices for each reference."""
    prepared = prepare_all(example.source.sentences, scorer)
    references = [scorer.prepare(reference) for reference in example.references]
    best, found = -1.0, []
    for reference in references:
        chosen = greedy_oracle(prepared, reference)
        scores = best_of(scorer.prepare(text_of(example.source, chosen)), references)
        if scores["rouge1"] + scores["rouge2"] > best:
            best, found = scores["rouge1"] + scores["rouge2"], chosen
    return found


def text_of(source: Source, chosen: Sequence[int]) -> str:
    """The chosen sentences, one per line."""
    return "\n".join(source.sentences[i] for i in chosen)


def floor_rows(name: str, examples: Sequence[Example], budget: Budget, scorer: Scorer) -> list[dict[str, float]]:
    """Scores of a floor in 0..1, one row per example; the choice is made once per document."""
    known: dict[int, list[int]] = {}
    rows = []
    for example in examples:
        if name == "oracle":
            chosen = oracle_choice(example, scorer)
        else:
            key = id(example.source)
            chosen = known.get(key) or known.setdefault(key, choose(name, example.source, budget))
        rows.append(scorer.score(text_of(example.source, chosen), example.references))
    return rows


def floors(recipe: SummarizationRecipe, data: Data) -> dict[str, dict[str, float]]:
    """Scores of every floor on the test part, x 100."""
    test: Any = data.test
    budget, scorer = budget_of(recipe, data.spec), Scorer()
    found = {name: means(floor_rows(name, test.examples, budget, scorer)) for name in (*SCORES, "oracle")}
    if recipe.data.generated is None:
        found["optimum"] = found.pop("oracle")
    else:
        found["optimum"] = means([scorer.score(e.references[0], e.references) for e in test.examples])
    return found
