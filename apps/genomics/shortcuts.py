"""Linear models beside the attention, started at their fit, so that training starts at a floor.

    position, kmer, first, last, length   features of whole sequences, joined by "+" (`terms.py`)
    window      the letters around a base
    markov      what the last letters say of the next one
    neighbours  what the letters on both sides say of the one between

Each gives logits or values [B, K], or [B, N, K] per token, to be added to those of the head.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from apps.genomics.alphabet import ALPHABETS
from apps.genomics.terms import term_features
from apps.genomics.words import Term, shortcut_terms
from core.training.matrices import unpack


class Shortcut(nn.Module):
    """Base: knows what each letter may be.

    Args:
        composition: [letters, atoms], what a letter may be; MASK and START are nothing.
        weights, bias: of the fit.
    """

    composition: Tensor
    bias: nn.Parameter

    def __init__(self, composition: Tensor, weights: Tensor, bias: Tensor | None = None):
        super().__init__()
        nothing = composition.new_zeros(2, composition.shape[1])
        self.register_buffer("composition", torch.cat([composition, nothing]), persistent=False)
        self.atoms = composition.shape[1]
        self.weight = nn.Parameter(weights)
        if bias is not None:
            self.bias = nn.Parameter(bias)

    def letters(self, ids: Tensor, mask: Tensor) -> Tensor:
        """What each token may be, [B, N, atoms]; nothing where it is padding."""
        return self.composition[ids] * mask.unsqueeze(-1)


class SequenceShortcut(Shortcut):
    """Weights [F, K] for the features of whole sequences (`terms.py`)."""

    def __init__(self, composition: Tensor, weights: Tensor, bias: Tensor, terms: Sequence[Term]):
        super().__init__(composition, weights, bias)
        self.terms = list(terms)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """[B, K]."""
        return term_features(self.terms, ids, mask, self.composition) @ self.weight + self.bias


class WindowShortcut(Shortcut):
    """Weights [size * atoms, K] for the letters around a base."""

    def __init__(self, composition: Tensor, weights: Tensor, bias: Tensor, size: int):
        super().__init__(composition, weights, bias)
        self.size = size

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """[B, N, K]."""
        kernel = self.weight.T.unflatten(1, (self.size, self.atoms)).transpose(1, 2)
        x = self.letters(ids, mask).transpose(1, 2)
        return nn.functional.conv1d(x, kernel, self.bias, padding=self.size // 2).transpose(1, 2)


class MarkovShortcut(Shortcut):
    """A table [contexts, atoms] of log-probabilities for every context of 0 to `order` letters.

    A position is given the longest context that is whole: fewer letters at the start and after an ambiguous one.
    """

    def __init__(self, composition: Tensor, weights: Tensor, order: int):
        super().__init__(composition, weights)
        self.order = order

    @property
    def reach(self) -> int:
        """Tokens that it looks at, the newest among them."""
        return self.order

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """[B, N, atoms]; ids are shifted by one already, so the newest letter of a context stands at its position."""
        real = (ids < self.atoms) & mask
        letters = ids.clamp(max=self.atoms - 1)
        number = torch.zeros_like(ids)
        known = torch.ones_like(real)
        length = torch.zeros_like(ids)
        for back in range(self.order):
            one = nn.functional.pad(letters, (back, 0))[:, : ids.shape[1]]
            known = known & nn.functional.pad(real, (back, 0))[:, : ids.shape[1]]
            number = torch.where(known, number + one * self.atoms**back, number)
            length = length + known
        # Contexts of length n start at row (atoms^n - 1) / (atoms - 1).
        row = (self.atoms**length - 1) // (self.atoms - 1) + number
        return nn.functional.embedding(row, self.weight)


class NeighbourShortcut(Shortcut):
    """A table [contexts, atoms] of log-probabilities for `side` letters on either side.

    A neighbour that is masked, ambiguous or not there is a letter of its own, unknown. The letter between is not read.
    """

    def __init__(self, composition: Tensor, weights: Tensor, side: int):
        super().__init__(composition, weights)
        self.side = side

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """[B, N, atoms]."""
        unknown = self.atoms
        known = torch.where(mask, ids, unknown).clamp(max=unknown)
        known = nn.functional.pad(known, (self.side, self.side), value=unknown)
        row = torch.zeros_like(ids)
        # In the order in which they were counted: from far to near on the left, then on the right.
        for at in (*range(self.side), *range(2 * self.side, self.side, -1)):
            row = row * (unknown + 1) + known[:, at : at + ids.shape[1]]
        return nn.functional.embedding(row, self.weight)


def build_shortcut(spec: dict[str, Any], outputs: int, frozen: bool = False) -> Shortcut | None:
    """The shortcut that `build_data` fitted, if the recipe wants one; frozen: training leaves it as it is."""
    found = _build(spec, outputs)
    return found if found is None else found.requires_grad_(not frozen)


def _build(spec: dict[str, Any], outputs: int) -> Shortcut | None:
    fitted = spec.get("shortcut")
    if fitted is None:
        return None
    composition = torch.from_numpy(ALPHABETS[spec["tokens"]["alphabet"]].composition)
    weights, terms = unpack(fitted["weights"]), shortcut_terms(fitted["terms"])
    if weights.shape[1] != outputs:
        raise ValueError(f"the shortcut has {weights.shape[1]} answers, the model {outputs}")
    kind, size = terms[0]
    if kind == "markov":
        return MarkovShortcut(composition, weights, size)
    if kind == "neighbours":
        return NeighbourShortcut(composition, weights, size)
    bias = unpack(fitted["bias"])
    if kind == "window":
        return WindowShortcut(composition, weights, bias, size)
    return SequenceShortcut(composition, weights, bias, terms)
