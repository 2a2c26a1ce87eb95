"""ScisummNet in its own form: a paper per XML file, and human summaries (WING-NUS/scisumm-corpus).

A human summary begins with the paper's title and abstract. Left in the document, Lead scores rouge1 70 by copying; so
by default both are taken out, and papers whose abstract is not marked, and would stay in, are left out of all parts.
Every 8th paper by id is test, every 8th of the rest validation.
"""

import gzip
import html
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

from apps.summarization.documents import Example, Source, source_from_sentences
from apps.summarization.recipe import DataSection
from core.training.errors import UserError
from core.training.rows import read_rows

TEST_EVERY = 8


def read_scisummnet(folder: Path, options: DataSection, reports: dict[str, Any]) -> dict[str, list[Example]]:
    """Examples by part, in the order of ids.

    Raises:
        UserError: the folder has not the form of the data set, or a paper is not XML.
    """
    rows = {}
    for row in read_rows(folder / "summaries.jsonl", columns=("id", "human_summary")):
        rows[row.values["id"]] = row
    found: dict[str, list[Example]] = {"train": [], "val": [], "test": []}
    kept = 0
    for number, name in enumerate(sorted(rows)):
        part = "test" if number % TEST_EVERY == 0 else "val" if kept % TEST_EVERY == TEST_EVERY // 2 else "train"
        kept += part != "test"
        source, marked = read_paper(_file(folder, name), options.leak)
        if options.leak != "none" and not marked:
            reports[part].skip("abstract not marked", name)
            continue
        if source.words < max(options.min_words, 1):
            reports[part].skip(f"under {max(options.min_words, 1)} words", name)
            continue
        found[part].append(Example(name, source, None, (rows[name].values["human_summary"].strip(),)))
    return found


def _file(folder: Path, name: str) -> Path:
    for path in (folder / "xml" / f"{name}.xml.gz", folder / "xml" / f"{name}.xml"):
        if path.is_file():
            return path
    raise UserError(f"{folder / 'xml'} has no {name}.xml.gz, which summaries.jsonl names")


def read_paper(path: Path, leak: str) -> tuple[Source, bool]:
    """A paper in sentences and sections without what `leak` names, and whether its abstract is marked."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        paper = ET.fromstring(raw)
    except (ET.ParseError, OSError) as error:
        raise UserError(f"{path}: not a readable paper: {error}") from error
    sentences, sections, titles = [], [], []
    for block in paper:
        if block.tag == "S":
            texts, title = ([], "") if leak == "clean" else ([_words(block)], "title")
        elif block.tag == "ABSTRACT":
            texts, title = ([], "") if leak != "none" else ([_words(s) for s in block.iter("S")], "abstract")
        else:
            texts, title = [_words(s) for s in block.iter("S")], block.get("title") or ""
        texts = [text for text in texts if text]
        if texts:
            sections += [len(titles)] * len(texts)
            titles.append(title)
            sentences += texts
    return source_from_sentences(path.name.partition(".")[0], sentences, sections, titles), paper.find(
        "ABSTRACT"
    ) is not None


def _words(element: ET.Element) -> str:
    # The files have entities inside entities, such as &amp;quot;.
    return " ".join(html.unescape("".join(element.itertext())).split())
