"""Summaries of a user's own documents, from the run folder alone."""

import json
from pathlib import Path
from typing import Any

import torch

from apps.summarization.data import cut_documents
from apps.summarization.documents import Example
from apps.summarization.faithfulness import faithfulness
from apps.summarization.measuring import batch_of
from apps.summarization.page import write_page
from apps.summarization.reading import Report, read_part
from apps.summarization.recipe import DataSection
from apps.summarization.results import record
from apps.summarization.task import Outcome, SummaryTask
from core.training.errors import UserError
from core.training.run import LoadedRun

WRITES = {".jsonl": "a JSON line per document", ".txt": "the summaries", ".html": "a page"}


def predict(run: LoadedRun, input: Path, output: Path) -> list[Path]:
    """Summarise the documents of a file.

    Args:
        run: the trained run.
        input: a .txt file or a folder of them, or rows (JSONL, CSV, TSV, Parquet) with the columns that the run was
            trained on; summaries may be missing and are scored where they are there.
        output: .jsonl: a line per document with summary, sentence numbers and spans, scores; .txt: the summaries;
            .html: a page with the documents, the chosen sentences highlighted.

    Returns:
        The file.

    Raises:
        UserError: a suffix that is not written, or anything wrong with the input.
    """
    if output.suffix.lower() not in WRITES:
        known = ", ".join(f"{suffix} ({what})" for suffix, what in WRITES.items())
        raise UserError(f"{output.name}: predictions are written as {known}")
    outcomes, _ = summarise_file(run, input)
    if output.suffix.lower() == ".html":
        return [write_page(output, outcomes)]
    if output.suffix.lower() == ".txt":
        output.write_text("\n\n".join(outcome.summary for outcome in outcomes) + "\n")
        return [output]
    with output.open("w") as file:
        for outcome in outcomes:
            file.write(json.dumps(record(outcome), ensure_ascii=False) + "\n")
    return [output]


def summarise_file(run: LoadedRun, input: Path) -> tuple[list[Outcome], dict[str, Any]]:
    """An outcome per document, scored where the file has summaries, and the report of reading."""
    task = run.task
    assert isinstance(task, SummaryTask)
    options = DataSection.model_validate(task.spec["reading"] | {"on_empty": "error", "on_duplicate": "keep"})
    report = Report()
    examples = read_part(input, options, report, references=False)
    outcomes = summarise(task, examples, options)
    for outcome in outcomes:
        outcome.scores |= faithfulness(outcome.example.source.text, outcome.summary)
        if outcome.example.references:
            outcome.scores |= task.scorer.score(outcome.summary, outcome.example.references)
    return outcomes, report.plain()


def summarise(task: SummaryTask, examples: list[Example], options: DataSection) -> list[Outcome]:
    """Summaries of examples, one document at a time: a document may be long."""
    if "tokenizer" not in task.spec:
        examples = cut_documents(examples, options)[0]
    with torch.no_grad():
        return [task.summarise(batch_of(task, example))[0] for example in examples]
