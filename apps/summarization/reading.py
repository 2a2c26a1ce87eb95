"""Files in, examples out: rows, folders of texts, SQuALITY and ScisummNet; all that is left out is counted."""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from apps.summarization.documents import Example, Source, source_from_sentences, source_from_text
from apps.summarization.recipe import DataSection
from apps.summarization.scisummnet import read_scisummnet
from apps.summarization.squality import read_squality
from core.training.errors import UserError
from core.training.rows import read_rows

MOST_NAMED = 5
"""Rows that are named in the summary for each reason; the rest is only counted."""


class Report:
    """What was read of one part and what was left out, with the first rows of each kind by name."""

    def __init__(self):
        self.counts: Counter[str] = Counter()
        self.named: dict[str, list[str]] = {}

    def skip(self, reason: str, where: str, policy: str = "skip") -> None:
        """Count something; with policy "error" it ends here.

        Raises:
            UserError: policy "error".
        """
        if policy == "error":
            raise UserError(f"{where}: {reason}")
        self.counts[reason] += 1
        names = self.named.setdefault(reason, [])
        if len(names) < MOST_NAMED:
            names.append(where)

    def plain(self) -> dict[str, Any]:
        """For `Data.summary`."""
        return {**self.counts, **({"rows": self.named} if self.named else {})}


def read_part(path: str | Path, options: DataSection, report: Report, *, references: bool = True) -> list[Example]:
    """Examples of a file of rows, or of a folder of .txt files.

    Args:
        path: file, folder, or "hub:...".
        options: of the recipe.
        report: takes what is left out.
        references: rows must have a summary; without, as for prediction, they may.

    Raises:
        UserError: as the policies of `options` say, and where nothing is left.
    """
    found, seen, texts = [], set(), {}
    for where, row in _records(path, options, report, references):
        example = _example(where, row, options, report, references, texts)
        if example is None:
            continue
        if example.id in seen and options.on_duplicate != "keep":
            report.skip(f"the id {example.id!r} is there twice" if options.on_duplicate == "error" else "duplicate id",
                        where, options.on_duplicate)  # fmt: skip
            continue
        seen.add(example.id)
        found.append(example)
    if not found:
        left = ", ".join(f"{count} with {reason}" for reason, count in report.counts.items())
        raise UserError(f"{path}: no document is left{f' ({left})' if left else ''}")
    return found


def read_set(path: Path, options: DataSection, reports: dict[str, Report]) -> dict[str, list[Example]]:
    """Train, val and test of a folder in its own format."""
    if options.format == "squality":
        return read_squality(path, options, reports)
    return read_scisummnet(path, options, reports)


def _records(
    path: str | Path, options: DataSection, report: Report, references: bool
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of a file or folder; a text file is one row."""
    names = options.columns
    local = Path(path).expanduser()
    if not str(path).startswith("hub:") and (local.is_dir() or local.suffix.lower() in (".txt", ".text", ".md")):
        files = sorted(file for file in local.rglob("*.txt")) if local.is_dir() else [local]
        if not files:
            raise UserError(f"{local}: a folder without .txt files")
        for file in files:
            summary = file.with_suffix(".summary")
            row: dict[str, Any] = {names.document: _text(file), names.id: file.stem}
            if summary.is_file():
                row[names.summary] = _text(summary)
            yield str(file), row
        return
    wanted = [names.document] + ([names.summary] if references else [])
    on_bad = None if options.on_bad == "error" else lambda text: report.skip("row that cannot be read", text)
    for found in read_rows(path, columns=wanted, on_bad=on_bad):
        yield found.where, found.values


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error


def _example(
    where: str, row: dict[str, Any], options: DataSection, report: Report, references: bool, texts: dict[str, Source]
) -> Example | None:
    """The example of a row, None where a policy leaves it out; equal texts share one Source."""
    names = options.columns
    raw = row.get(names.document)
    name = str(row[names.id]) if row.get(names.id) not in (None, "") else where
    if not isinstance(raw, str) and not (isinstance(raw, list) and all(isinstance(s, str) for s in raw)):
        report.skip(
            f"{names.document} must be text or a list of texts, got {type(raw).__name__}", where, options.on_bad
        )
        return None
    summaries = row.get(names.summary)
    summaries = [summaries] if isinstance(summaries, str) else summaries or []
    if not (isinstance(summaries, list) and all(isinstance(s, str) for s in summaries)):
        kind = type(summaries).__name__
        report.skip(f"{names.summary} must be text or a list of texts, got {kind}", where, options.on_bad)
        return None
    key = raw if isinstance(raw, str) else "\n".join(raw)
    if not re.search(r"\w", key):
        report.skip("empty document", where, options.on_empty)
        return None
    summaries = [summary.strip() for summary in summaries if re.search(r"\w", summary)]
    if references and not summaries:
        report.skip("empty summary", where, options.on_empty)
        return None
    if key not in texts:
        texts[key] = source_from_text(name, raw) if isinstance(raw, str) else source_from_sentences(name, raw)
    source = texts[key]
    if source.words < options.min_words:
        report.skip(f"under {options.min_words} words", where)
        return None
    if summaries and min(len(summary.split()) for summary in summaries) > source.words:
        report.skip("summary longer than its document", where, options.on_longer)
        if options.on_longer != "keep":
            return None
    query = row.get(names.query)
    if query is not None and not isinstance(query, str):
        report.skip(f"{names.query} must be text, got {type(query).__name__}", where, options.on_bad)
        return None
    gold = row.get(names.gold)
    if gold is not None and not _numbers(gold, len(source.sentences)):
        last = len(source.sentences) - 1
        report.skip(f"{names.gold} must be a list of sentence numbers from 0 to {last}", where, options.on_bad)
        return None
    return Example(name, source, query or None, tuple(summaries), None if gold is None else tuple(gold))


def _numbers(gold: Any, count: int) -> bool:
    whole = isinstance(gold, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in gold)
    return whole and all(0 <= i < count for i in gold)
