"""SQuALITY in its own form: a line per story, with questions and four answers to each (nyu-mll/SQuALITY, v1-3/txt).

train.jsonl, dev.jsonl and test.jsonl hold different stories, so questions about one story never stand in two parts.
"""

from pathlib import Path
from typing import Any

from apps.summarization.documents import Example, source_from_text
from apps.summarization.recipe import DataSection
from core.training.errors import UserError
from core.training.rows import read_rows

FILES = {"train": "train.jsonl", "val": "dev.jsonl", "test": "test.jsonl"}


def read_squality(folder: Path, options: DataSection, reports: dict[str, Any]) -> dict[str, list[Example]]:
    """Examples by part; the first question of a story is always that of its plot.

    Raises:
        UserError: a file is missing or is not what it should be.
    """
    found: dict[str, list[Example]] = {}
    for part, file in FILES.items():
        found[part] = []
        for row in read_rows(folder / file, columns=("document", "questions")):
            try:
                uid = str(row.values["metadata"]["passage_id"])
                source = source_from_text(uid, row.values["document"])
                for number, question in enumerate(row.values["questions"]):
                    answers = tuple(response["response_text"] for response in question["responses"])
                    if options.questions == "all" or (number == 0) == (options.questions == "plot"):
                        name = f"{uid}-{number + 1}"
                        found[part].append(Example(name, source, question["question_text"], answers))
            except (KeyError, TypeError) as error:
                raise UserError(f"{row.where}: not a story of SQuALITY: {type(error).__name__} {error}") from error
        reports[part].counts["stories"] = len({example.source.id for example in found[part]})
    return found
