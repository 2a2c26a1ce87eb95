"""Files that a test leaves in the run folder: summaries with scores, and where in length and place they are good."""

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from apps.summarization.documents import Example
from apps.summarization.plots import draw_cost, draw_lengths, draw_places
from apps.summarization.rouge import Scorer

if TYPE_CHECKING:
    from apps.summarization.task import Outcome

BUCKETS = 5
"""Of source length, with about as many documents in each."""
PLACES = 10
"""Of a document, from its beginning to its end."""


Measure = Callable[[Example], dict[str, Any]]


def write_results(run_dir: Path, outcomes: "Sequence[Outcome]", scorer: str, measure: Measure) -> list[Path]:
    """Write and draw; returns the files. `measure` gives the columns of cost of a document.

    predictions.jsonl: id, query, prediction, references, source words, sentence numbers and character spans.
    scores.csv: a row per document.   by_length.csv, by_place.csv: see `by_length` and `by_place`.
    """
    plots = run_dir / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    lengths, places = by_length(outcomes, measure), by_place(outcomes)
    files = [run_dir / name for name in ("predictions.jsonl", "scores.csv", "by_length.csv", "by_place.csv")]
    with files[0].open("w") as file:
        for outcome in outcomes:
            row = record(outcome) | {"references": list(outcome.example.references), "scorer": scorer}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    rows = [
        {"id": outcome.example.id, "source_words": outcome.example.source.words} | _shown(outcome)
        for outcome in outcomes
    ]
    for path, table in zip(files[1:], (rows, lengths, places)):
        write_table(path, table)
    drawn = draw_lengths(plots / "by_length.png", lengths), draw_cost(plots / "cost_by_length.png", lengths)
    return [*files, *drawn, draw_places(plots / "by_place.png", places)]


def record(outcome: "Outcome") -> dict[str, Any]:
    """A summary for a JSON line: what it says and the sentences that it rests on, by number and place in the text."""
    source = outcome.example.source
    found: dict[str, Any] = {
        "id": outcome.example.id,
        "query": outcome.example.query,
        "summary": outcome.summary,
        "source_words": source.words,
        "summary_words": len(outcome.summary.split()),
        "cut": outcome.cut,
        "ended": outcome.ended,
    }
    if outcome.sentences is not None:
        found["sentences"] = [source.numbers[i] for i in outcome.sentences]
        found["spans"] = [list(source.spans[i]) for i in outcome.sentences]
    if outcome.weights is not None and outcome.sentences is not None:
        found["weights"] = [round(float(outcome.weights[i]), 4) for i in outcome.sentences]
    if outcome.scores:
        found["scores"] = {name: round(value, 5) for name, value in outcome.scores.items()}
    return found


def _shown(outcome: "Outcome") -> dict[str, float]:
    return {"summary_words": len(outcome.summary.split()), **{k: round(v, 5) for k, v in outcome.scores.items()}}


def by_length(outcomes: "Sequence[Outcome]", measure: Measure) -> list[dict[str, Any]]:
    """Scores in buckets of source length, shortest first, and what the middle document of each costs.

    That one is summarised once more, alone: see `apps.summarization.measuring.measure`.
    """
    order = sorted(outcomes, key=lambda outcome: outcome.example.source.words)
    rows = []
    for bucket in np.array_split(np.arange(len(order)), min(BUCKETS, len(order))):
        inside = [order[i] for i in bucket]
        words = [outcome.example.source.words for outcome in inside]
        middle = inside[len(inside) // 2].example
        rows.append(
            {
                "least_words": min(words),
                "most_words": max(words),
                "documents": len(inside),
                **{m: round(100 * np.mean([o.scores[m] for o in inside]), 3) for m in ("rouge1", "rouge2", "rougeL")},
                "middle_words": middle.source.words,
                **measure(middle),
            }
        )
    return rows


def by_place(outcomes: "Sequence[Outcome]") -> list[dict[str, float]]:
    """What of the source gets into the summary, by tenth of the document: is the middle lost?

    wanted: share of the references' bigrams found in the source that stand in this tenth.
    recalled: share of those that the summary has.
    """
    scorer = Scorer()
    wanted, recalled = np.zeros(PLACES), np.zeros(PLACES)
    for outcome in outcomes:
        source = outcome.example.source
        said = set(scorer.prepare(outcome.summary).grams(2))
        asked = set().union(*(scorer.prepare(text).grams(2) for text in outcome.example.references))
        for i, sentence in enumerate(source.sentences):
            hits = asked & set(scorer.prepare(sentence).grams(2))
            place = i * PLACES // len(source.sentences)
            wanted[place] += len(hits)
            recalled[place] += len(hits & said)
    total = max(wanted.sum(), 1)
    return [
        {
            "tenth": i + 1,
            "wanted": round(float(wanted[i] / total), 4),
            "recalled": round(float(recalled[i] / max(wanted[i], 1)), 4),
        }
        for i in range(PLACES)
    ]


def write_table(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """CSV with the keys of the first row as header."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
