"""The short words of a recipe (`kmer:6`, `markov:6`) and what they mean. No torch here."""

import re
from typing import NamedTuple

from core.attention.registry import nearest

ALONE = {"window": (3, 65), "markov": (1, 8), "neighbours": (1, 4)}
"""Shortcuts of answers per base, and the bounds of their size."""
TERMS = {"position": (1, 3), "kmer": (1, 6), "first": (1, 100), "last": (1, 100), "length": (0, 0)}
"""Terms of shortcuts of whole sequences, which can be joined by `+`, and the bounds of their size."""


def parse_tokens(text: str) -> tuple[str, int, int]:
    """(kind, size, stride) of `data.tokens`.

    Raises:
        ValueError: it is none of the forms that `tokens.py` lists, or a size out of bounds.
    """
    match = re.fullmatch(r"char|kmer:(?P<k>\d+)(:(?P<stride>\d+))?|bpe:(?P<size>\d+)", text)
    if match is None:
        raise ValueError(f"tokens must be char, kmer:6, kmer:6:6 or bpe:1024, got {text!r}")
    if match["k"]:
        k, stride = int(match["k"]), int(match["stride"] or 1)
        if not 2 <= k <= 8 or not 1 <= stride <= k:
            raise ValueError(f"a k-mer has 2 to 8 letters and a stride of 1 to k, got {text!r}")
        return "kmer", k, stride
    if match["size"]:
        if not 64 <= int(match["size"]) <= 65536:
            raise ValueError(f"BPE has 64 to 65536 pieces, got {text!r}")
        return "bpe", int(match["size"]), 0
    return "char", 1, 1


def check_tokens(text: str, alphabet: str) -> None:
    """Raise ValueError unless these tokens can be made of this alphabet."""
    if parse_tokens(text)[0] == "kmer" and alphabet != "dna":
        raise ValueError(f"tokens={text} are for DNA; use char or bpe:1024 for proteins")


class Term(NamedTuple):
    """A set of features of a whole sequence (`terms.py`), or the one kind of a shortcut per base."""

    kind: str
    size: int


def shortcut_terms(text: str) -> list[Term]:
    """What `model.shortcut` adds up: nothing for `none`, one of `ALONE`, or terms of a whole sequence.

    Raises:
        ValueError: unknown, a size out of bounds, a term given twice, or one joined that stands alone.
    """
    if text == "none":
        return []
    terms = [_term(word) for word in text.split("+")]
    kinds = [term.kind for term in terms]
    for kind in kinds:
        if kind in ALONE and len(terms) > 1:
            raise ValueError(f"shortcut {kind} stands alone; what can be joined: {', '.join(TERMS)}")
        if kind in ("position", "length") and kinds.count(kind) > 1:
            raise ValueError(f"shortcut {text!r} names {kind} twice")
    return terms


def _term(word: str) -> Term:
    kind, colon, size = word.partition(":")
    bounds = ALONE | TERMS
    if kind not in bounds:
        known = (
            "none",
            "position:2",
            "kmer:4",
            "first:30",
            "last:20",
            "length",
            "window:17",
            "markov:6",
            "neighbours:3",
        )
        raise ValueError(f"unknown shortcut {word!r}{nearest(word, known)}; known: {', '.join(known)}")
    if word == "position":
        return Term(kind, 1)
    low, high = bounds[kind]
    if kind == "length":
        if colon:
            raise ValueError(f"shortcut length has no size, got {word!r}")
        return Term(kind, 0)
    if not colon or not size.isdigit() or not low <= int(size) <= high or (kind == "window" and int(size) % 2 == 0):
        odd = "an odd number " if kind == "window" else ""
        raise ValueError(f"shortcut {kind} has a size, {odd}from {low} to {high}, as in {kind}:{high - 1 | 1}")
    return Term(kind, int(size))


def by_position(text: str) -> bool:
    """Whether the shortcut reads sequences of one length alone."""
    return any(term.kind == "position" for term in shortcut_terms(text))
