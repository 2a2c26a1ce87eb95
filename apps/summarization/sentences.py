"""Sentences of a text, offline: rules for English prose and papers, with the place of each in the text.

A sentence ends after . ! ? or an ellipsis, closing quotes and brackets included, when white space and something that
can begin a sentence follow, unless the word before the full stop is an abbreviation or an initial. A blank line ends
one too, unless the text obviously goes on. Full stops of scripts without spaces (U+3002 and its kin) end one as well.
"""

import re
from typing import NamedTuple

ABBREVIATIONS = frozenset(
    {"mr", "mrs", "ms", "dr", "prof", "rev", "hon", "gen", "col", "capt", "lt", "sgt", "cmdr", "gov", "sen", "rep"}
    | {
        "st",
        "jr",
        "sr",
        "messrs",
        "mme",
        "mlle",
        "fig",
        "figs",
        "eq",
        "eqs",
        "sec",
        "ch",
        "vol",
        "no",
        "nos",
        "pp",
        "p",
    }
    | {"ed", "eds", "al", "cf", "vs", "etc", "approx", "dept", "est", "inc", "ltd", "co", "corp", "e.g", "i.e", "viz"}
    | {"resp", "ca", "jan", "feb", "mar", "apr", "jun", "jul", "aug", "sep", "sept", "oct", "nov", "dec"}
)
"""Without the final full stop, in lower case."""
_END = re.compile(r"(?:[.!?…]+[\"'”’)\]]*(?=\s)|[。！？]+[」』”’]*)")
_BEGIN = re.compile(r"\s*[\"'“‘(\[\-—–•*]*\s*(?:[A-Z0-9À-ÞА-ЯΑ-Ω]|[^\x00-\u024f\s])")
_GAP = re.compile(r"\n[^\S\n]*\n\s*")
_WORD_BEFORE = re.compile(r"[\w.]+$")


class Sentence(NamedTuple):
    """text: white space made single; start, end: of the sentence in the text that was split."""

    text: str
    start: int
    end: int


def split_sentences(text: str) -> list[Sentence]:
    """The sentences of a text in order; together they hold all that is not white space."""
    borders = sorted({*_stops(text), *_gaps(text), len(text)})
    found, start = [], 0
    for end in borders:
        piece = text[start:end]
        if words := piece.split():
            first = start + len(piece) - len(piece.lstrip())
            found.append(Sentence(" ".join(words), first, start + len(piece.rstrip())))
        start = end
    return found


def _stops(text: str) -> list[int]:
    """Ends after punctuation."""
    ends = []
    for match in _END.finditer(text):
        mark = match.group()
        certain = mark[0] in "。！？" or match.end() == len(text)
        if certain or (_BEGIN.match(text, match.end()) and not (mark == "." and _abbreviated(text, match.start()))):
            ends.append(match.end())
    return ends


def _abbreviated(text: str, stop: int) -> bool:
    before = _WORD_BEFORE.search(text, max(0, stop - 20), stop)
    word = before.group().lower() if before else ""
    return word in ABBREVIATIONS or (len(word) == 1 and word.isalpha() and word != "i")


def _gaps(text: str) -> list[int]:
    """Blank lines, except inside a sentence: the line before has no end and what follows is in lower case."""
    ends = []
    for match in _GAP.finditer(text):
        before, after = (
            text[max(0, match.start() - 40) : match.start()].rstrip()[-1:],
            text[match.end() : match.end() + 1],
        )
        if before in (",", "-") or (after.islower() and before not in tuple(".!?:\"'”’)")):
            continue
        ends.append(match.start())
    return ends
