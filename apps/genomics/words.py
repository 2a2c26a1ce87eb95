"""The short words of a recipe (`kmer:6`, `markov:6`) and what they mean. No torch here."""

import re

from core.attention.registry import nearest

SHORTCUTS = {"kmer": (1, 6), "window": (3, 65), "markov": (1, 8), "neighbours": (1, 4)}
"""Shortcuts that have a size, and its bounds."""


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


def shortcut_parts(text: str) -> tuple[str, int]:
    """(kind, size) of `model.shortcut`; the size of `none` and `position` is 0.

    Raises:
        ValueError: unknown, or a size out of bounds.
    """
    if text in ("none", "position"):
        return text, 0
    kind, colon, size = text.partition(":")
    if kind not in SHORTCUTS:
        known = ("none", "position", "kmer:4", "window:17", "markov:6", "neighbours:3")
        raise ValueError(f"unknown shortcut {text!r}{nearest(text, known)}; known: {', '.join(known)}")
    low, high = SHORTCUTS[kind]
    if not colon or not size.isdigit() or not low <= int(size) <= high or (kind == "window" and int(size) % 2 == 0):
        odd = "an odd number " if kind == "window" else ""
        raise ValueError(f"shortcut {kind} has a size, {odd}from {low} to {high}, as in {kind}:{high - 1 | 1}")
    return kind, int(size)
