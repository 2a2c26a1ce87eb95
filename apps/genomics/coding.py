"""Records as what the model reads: codes, tokens, crops, and stretches of a length that fits."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from apps.genomics.alphabet import Alphabet
from apps.genomics.items import Items, Stretch, cut
from apps.genomics.recipe import LANGUAGE, PER_BASE, GenomicsRecipe
from apps.genomics.records import Record
from apps.genomics.tokens import Tokens
from core.training.errors import UserError


def make_items(
    recipe: GenomicsRecipe,
    tokens: Tokens,
    records: Sequence[Record],
    codes: Sequence[np.ndarray],
    part: str,
    *,
    targets: Sequence[Any] | None = None,
    copied: np.ndarray | None = None,
) -> Items:
    """Tokens of these records, cut into the stretches that the model sees at once.

    Raises:
        UserError: a sequence is longer than `data.length` and the recipe does not say what to do, or has no token.
    """
    options, size = recipe.data, recipe.data.length
    whole = recipe.task not in (*PER_BASE, *LANGUAGE)
    sequences, others, scored, stretches, letters = [], [], [], [], []
    both = recipe.model.strand != "none" and not tokens.is_char
    for number, (record, one) in enumerate(zip(records, codes)):
        if whole and size is not None:
            one = cropped(one, tokens, size, options.crop, record.where)
        found = tokens.encode(one)
        sequences.append(found)
        letters.append(one)
        if both:
            others.append(tokens.encode(tokens.alphabet.reverse_complement(one)))
        if recipe.task in LANGUAGE:
            # An ambiguous letter is nothing to predict; what counts is said per letter, so tokens are letters there.
            asked = found < tokens.targets
            scored.append(asked if record.scored is None else asked & record.scored)
        if whole:
            stretches.append(Stretch(number, 0, len(found), 0, len(found)))
            continue
        stride = (options.stride or size) if part == "train" else None
        places = cut(len(found), size, stride, options.overlap, recipe.task == "causal")
        stretches += [Stretch(number, *place) for place in places]
    return Items(
        part,
        sequences,
        stretches,
        targets=targets,
        others=others or None,
        scored=scored or None,
        copied=copied,
        places=[(record.id, record.contig, record.start) for record in records],
        per_token=recipe.task in PER_BASE,
        letters=None if tokens.is_char else letters,
    )


def cropped(codes: np.ndarray, tokens: Tokens, size: int, how: str, where: str) -> np.ndarray:
    """The part of a sequence that has at most `size` tokens.

    Raises:
        UserError: it has more, and how="error".
    """
    count = len(tokens.encode(codes))
    if count <= size:
        return codes
    if how == "error":
        raise UserError(
            f"{where}: {count} tokens, data.length={size}; give a larger length or say data.crop=start, centre or end"
        )
    while count > size:
        # Pieces of BPE differ in length, so the cut is found in a few steps; letters and k-mers take one.
        keep = (
            max(1, min(len(codes) - 1, len(codes) * size // count))
            if tokens.kind == "bpe"
            else ((size - 1) * tokens.stride + tokens.k if tokens.kind == "kmer" else size)
        )
        start = {"start": 0, "centre": (len(codes) - keep) // 2, "end": len(codes) - keep}[how]
        codes = codes[start : start + keep]
        count = len(tokens.encode(codes))
        if tokens.kind != "bpe":
            break
    return codes


def encode(records: Sequence[Record], alphabet: Alphabet) -> list[np.ndarray]:
    """Codes of each record's letters."""
    return [alphabet.encode(record.sequence, record.where) for record in records]


def unmasked(record: Record) -> np.ndarray:
    """bool [L], the bases that count: not soft-masked (lower case), and scored if the record says which are."""
    upper = np.frombuffer(record.sequence.encode("latin-1"), dtype=np.uint8) < ord("a")
    return upper if record.scored is None else upper & record.scored
