"""ScisummNet in its own form: a paper per XML file, and human summaries (WING-NUS/scisumm-corpus).

A human summary begins with the paper's title and abstract. Left in the document, Lead scores rouge1 70 by copying; so
by default both are taken out, and papers whose abstract is not marked, and would stay in, are left out of all parts.
Some papers, most of them from journals, repeat the abstract in the body under another mark; leak=strict takes out also
every sentence of the body of which half of the 4-grams stand in the abstract, and papers whose abstract is marked but
empty. Every 8th paper by id is test, every 8th of the rest validation.
"""

import gzip
import html
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any, NamedTuple

from apps.summarization.documents import Example, Source, source_from_sentences
from apps.summarization.recipe import DataSection
from apps.summarization.rouge import Scorer
from core.training.errors import UserError
from core.training.rows import read_rows

TEST_EVERY = 8
LEAST_ABSTRACT = 20
"""Words below which a marked abstract is taken for an empty element (strict)."""
GRAM, SHARE = 4, 0.5
"""A sentence repeats the abstract when this share of its n-grams stands there; most that share any share nearly all."""


class Paper(NamedTuple):
    """A paper without what was to be taken out, whether its abstract is marked, and sentences that repeated it."""

    source: Source
    marked: bool
    repeated: int


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
        source, marked, repeated = read_paper(_file(folder, name), options.leak)
        if options.leak != "none" and not marked:
            reports[part].skip("abstract not marked", name)
            continue
        if source.words < max(options.min_words, 1):
            reports[part].skip(f"under {max(options.min_words, 1)} words", name)
            continue
        if repeated:
            reports[part].skip("papers that repeat their abstract", name)
            reports[part].counts["sentences that repeat an abstract"] += repeated
        found[part].append(Example(name, source, None, (rows[name].values["human_summary"].strip(),)))
    return found


def _file(folder: Path, name: str) -> Path:
    for path in (folder / "xml" / f"{name}.xml.gz", folder / "xml" / f"{name}.xml"):
        if path.is_file():
            return path
    raise UserError(f"{folder / 'xml'} has no {name}.xml.gz, which summaries.jsonl names")


def read_paper(path: Path, leak: str) -> Paper:
    """A paper in sentences and sections without what `leak` names.

    Raises:
        UserError: it is not XML.
    """
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        paper = ET.fromstring(raw)
    except (ET.ParseError, OSError) as error:
        raise UserError(f"{path}: not a readable paper: {error}") from error
    abstract = [_words(sentence) for element in paper.iter("ABSTRACT") for sentence in element.iter("S")]
    said = {gram for sentence in abstract for gram in _grams(sentence)} if leak == "strict" else set()
    sentences, sections, titles, repeated = [], [], [], 0
    for block in paper:
        if block.tag == "S":
            texts, title = ([], "") if leak in ("strict", "clean") else ([_words(block)], "title")
        elif block.tag == "ABSTRACT":
            texts, title = (abstract, "abstract") if leak == "none" else ([], "")
        else:
            whole, title = [_words(s) for s in block.iter("S")], block.get("title") or ""
            texts = [text for text in whole if not _repeats(text, said)]
            repeated += len(whole) - len(texts)
        texts = [text for text in texts if text]
        if texts:
            sections += [len(titles)] * len(texts)
            titles.append(title)
            sentences += texts
    if leak == "strict":
        marked = sum(len(sentence.split()) for sentence in abstract) >= LEAST_ABSTRACT
    else:
        marked = paper.find("ABSTRACT") is not None
    return Paper(source_from_sentences(path.name.partition(".")[0], sentences, sections, titles), marked, repeated)


def _grams(text: str) -> set[tuple[str, ...]]:
    tokens = Scorer().words(text)
    return set(zip(*(tokens[i:] for i in range(GRAM))))


def _repeats(text: str, said: set[tuple[str, ...]]) -> bool:
    """Whether a sentence of at least two n-grams stands, by half, in the abstract."""
    own = _grams(text) if said else set()
    return len(own) > 1 and len(own & said) >= SHARE * len(own)


def _words(element: ET.Element) -> str:
    # The files have entities inside entities, such as &amp;quot;.
    return " ".join(html.unescape("".join(element.itertext())).split())
