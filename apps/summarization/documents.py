"""What the app reads: documents in sentences, what is asked of them, and summaries that people wrote."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from apps.summarization.sentences import split_sentences


@dataclass(eq=False)
class Source:
    """A document in sentences.

    Attributes:
        id: as the file has it, else file and row.
        sentences: texts with single white space.
        spans: start and end of each in `text`.
        text: the document as given.
        sections: number of the section of each sentence, from 0; all 0 where the file knows no sections.
        titles: of the sections.
        numbers: of the sentences in the whole document, where some were cut off; else 0, 1, 2, ...
        cut_words: words that were cut off.
    """

    id: str
    sentences: list[str]
    spans: list[tuple[int, int]] = field(default_factory=list)
    text: str = ""
    sections: list[int] = field(default_factory=list)
    titles: list[str] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    cut_words: int = 0

    def __post_init__(self):
        self.sections = self.sections or [0] * len(self.sentences)
        self.titles = self.titles or [""]
        self.numbers = self.numbers or list(range(len(self.sentences)))

    @property
    def words(self) -> int:
        """Words by white space."""
        return sum(len(sentence.split()) for sentence in self.sentences)


@dataclass(eq=False)
class Example:
    """A document, what is asked of it (None: a summary of all of it), and the references, at least one to train on.

    gold: numbers of the sentences that belong into the summary, where the file marks them; None: ROUGE decides.
    """

    id: str
    source: Source
    query: str | None
    references: tuple[str, ...]
    gold: tuple[int, ...] | None = None


def shorten(source: Source, most: int, overflow: str) -> tuple[Source, int]:
    """Whole sentences of at most `most` words, from the head or half from each end; and the words that were cut off."""
    sizes = [len(sentence.split()) for sentence in source.sentences]
    total = sum(sizes)
    if total <= most:
        return source, 0
    tail_words = most // 2 if overflow == "head_tail" else 0
    head, used = 0, 0
    while head < len(sizes) and used + sizes[head] <= most - tail_words:
        used += sizes[head]
        head += 1
    tail, kept = len(sizes), 0
    while tail > head and kept + sizes[tail - 1] <= tail_words:
        tail -= 1
        kept += sizes[tail]
    rows = [*range(max(head, 1)), *range(max(tail, head, 1), len(sizes))]
    columns: Any = (source.sentences, source.spans, source.sections, source.numbers)
    sentences, spans, sections, numbers = ([column[i] for i in rows] for column in columns)
    lost = total - sum(sizes[i] for i in rows)
    return Source(source.id, sentences, spans, source.text, sections, source.titles, numbers, lost), lost


def source_from_text(name: str, text: str) -> Source:
    """Split a text into sentences."""
    found = split_sentences(text)
    return Source(name, [one.text for one in found], [(one.start, one.end) for one in found], text)


def source_from_sentences(
    name: str, sentences: Sequence[str], sections: Sequence[int] = (), titles: Sequence[str] = ()
) -> Source:
    """A document that comes in sentences; its text is they, one per line."""
    clean = [" ".join(sentence.split()) for sentence in sentences]
    spans, at = [], 0
    for sentence in clean:
        spans.append((at, at + len(sentence)))
        at += len(sentence) + 1
    return Source(name, clean, spans, "\n".join(clean), list(sections), list(titles))
