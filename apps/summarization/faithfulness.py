"""How a summary keeps to its source, measured without a model: what is new in it, copied, repeated, named.

    novel_2          share of the summary's bigrams that the source does not have
    coverage         share of its words inside pieces copied from the source
    density          mean length of the piece that a word stands in (large: long pieces copied)
    repetition       share of its trigrams that it has had before
    names, numbers   share of its names and numbers that occur in the source; 1 where it has none

Source:
    coverage and density: Grusky et al. 2018, arXiv:1804.11283
"""

import re
from collections.abc import Sequence

_WORD = re.compile(r"\w+(?:[.,:]\d+)*")
_SENTENCE_START = re.compile(r"(?:^|[.!?:\n]\s*[\"'“‘(\[]*)$")
NAMES = ("novel_1", "novel_2", "novel_3", "coverage", "density", "repetition", "names", "numbers")


def faithfulness(source: str, summary: str) -> dict[str, float]:
    """All of the above; shares in 0..1, density in words. An empty summary has nothing new, copied or repeated."""
    there, said = (_WORD.findall(text.lower()) for text in (source, summary))
    pieces = fragments(there, said)
    size = max(1, len(said))
    known, names, numbers = set(there), names_of(summary), numbers_of(summary)
    return {
        **{f"novel_{n}": novel(there, said, n) for n in (1, 2, 3)},
        "coverage": sum(pieces) / size,
        "density": sum(piece * piece for piece in pieces) / size,
        "repetition": repetition(said),
        "names": _share([name.lower() in known for name in names]),
        "numbers": _share([number in known for number in numbers]),
    }


def novel(source: Sequence[str], summary: Sequence[str], n: int) -> float:
    """Share of the summary's different n-grams that the source lacks."""
    there = set(zip(*(source[i:] for i in range(n))))
    said = set(zip(*(summary[i:] for i in range(n))))
    return len(said - there) / len(said) if said else 0.0


def fragments(source: Sequence[str], summary: Sequence[str]) -> list[int]:
    """Lengths of the pieces, longest first from the left, into which the summary falls as copies from the source."""
    places: dict[str, list[int]] = {}
    for i, word in enumerate(source):
        places.setdefault(word, []).append(i)
    found, at = [], 0
    while at < len(summary):
        longest = 0
        for start in places.get(summary[at], ()):
            if longest and not _matches(source, summary, start, at, longest):
                continue  # cannot be longer than what is known already
            length = 1
            while (
                at + length < len(summary)
                and start + length < len(source)
                and summary[at + length] == source[start + length]
            ):
                length += 1
            longest = max(longest, length)
        if longest:
            found.append(longest)
        at += max(longest, 1)
    return found


def _matches(source: Sequence[str], summary: Sequence[str], start: int, at: int, length: int) -> bool:
    there = start + length < len(source) and at + length < len(summary)
    return there and source[start + length] == summary[at + length]


def repetition(words: Sequence[str]) -> float:
    """Share of trigrams that stand earlier in the text."""
    grams = list(zip(words, words[1:], words[2:]))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def names_of(text: str) -> list[str]:
    """Words with a capital that do not open a sentence, and that are not "I"."""
    return [
        match.group()
        for match in re.finditer(r"\b[A-Z]\w+", text)
        if not _SENTENCE_START.search(text[max(0, match.start() - 6) : match.start()])
    ]


def numbers_of(text: str) -> list[str]:
    """Words that begin with a digit, 1,234.5 being one."""
    return [word for word in _WORD.findall(text.lower()) if word[0].isdigit()]


def _share(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags) if flags else 1.0
