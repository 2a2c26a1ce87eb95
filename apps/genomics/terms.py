"""Features of whole sequences for linear models, said as terms that `+` joins, such as `kmer:4+length`.

    position:K   the k-mers of 1 to K letters at every position of sequences of one length; `position`: letters alone
    kmer:K       the share of each k-mer
    first:N      the share of each letter among the first N; of all where there are fewer
    last:N       the same of the last N
    length       the logarithm of the number of letters

Floors and shortcuts read the same features here. An ambiguous letter is shared among its atoms, but for k-mers of
several letters by share: one with an ambiguous letter does not count there.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from apps.genomics.alphabet import Alphabet
from apps.genomics.items import padded
from apps.genomics.words import Term

AT_ONCE = 256
"""Sequences whose features are worked out together."""


def term_features(terms: Sequence[Term], ids: Tensor, mask: Tensor, composition: Tensor) -> Tensor:
    """Features [B, F] of the sequences ids [B, N], mask [B, N]; composition [tokens, atoms]: what a token may be."""
    letters = composition[ids] * mask.unsqueeze(-1)
    made = {"position": _by_position, "kmer": _shares, "first": _first, "last": _last, "length": _length}
    return torch.cat([made[term.kind](term.size, ids, mask, letters) for term in terms], 1)


def feature_matrix(
    terms: Sequence[Term], sequences: Sequence[np.ndarray], alphabet: Alphabet, both_strands: bool = False
) -> np.ndarray:
    """[n, F] float32 of letter codes; both_strands: the mean over a sequence and its reverse complement."""
    if both_strands:
        turned = [alphabet.reverse_complement(one) for one in sequences]
        return (feature_matrix(terms, sequences, alphabet) + feature_matrix(terms, turned, alphabet)) / 2
    composition = torch.from_numpy(alphabet.composition)
    found = [
        term_features(terms, *padded(sequences[at : at + AT_ONCE]), composition).numpy()
        for at in range(0, len(sequences), AT_ONCE)
    ]
    return np.concatenate(found)


def _by_position(size: int, ids: Tensor, mask: Tensor, letters: Tensor) -> Tensor:
    found, words = [letters.flatten(1)], letters
    for more in range(1, size):
        # The words that start at each position, a letter longer.
        words = (words[:, :-1, :, None] * letters[:, more:, None, :]).flatten(2)
        found.append(words.flatten(1))
    return torch.cat(found, 1)


def _shares(size: int, ids: Tensor, mask: Tensor, letters: Tensor) -> Tensor:
    atoms, count = letters.shape[-1], ids.shape[1] - size + 1
    found = letters.new_zeros(len(ids), atoms**size)
    if count <= 0:
        return found
    number, clean = torch.zeros_like(ids[:, :count]), torch.ones_like(mask[:, :count])
    real = mask & (ids < atoms)
    for at in range(size):
        number = number * atoms + ids[:, at : at + count].clamp(max=atoms - 1)
        clean = clean & real[:, at : at + count]
    each = clean.to(found.dtype)
    return found.scatter_add_(1, number, each / each.sum(1, keepdim=True).clamp(min=1))


def _first(size: int, ids: Tensor, mask: Tensor, letters: Tensor) -> Tensor:
    return _mean(letters[:, :size], mask[:, :size])


def _last(size: int, ids: Tensor, mask: Tensor, letters: Tensor) -> Tensor:
    at = torch.arange(ids.shape[1], device=ids.device)
    return _mean(letters, mask & (at >= mask.sum(1, keepdim=True) - size))


def _mean(letters: Tensor, where: Tensor) -> Tensor:
    found = (letters * where.unsqueeze(-1)).sum(1)
    return found / found.sum(1, keepdim=True).clamp(min=1)


def _length(size: int, ids: Tensor, mask: Tensor, letters: Tensor) -> Tensor:
    return mask.sum(1, keepdim=True).to(letters.dtype).clamp(min=1).log()
