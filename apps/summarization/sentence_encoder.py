"""From the words of a sentence to one vector, and how rows of different lengths go through an encoder together."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from core.backbone import Encoder


class Words(NamedTuple):
    """All words of a batch one after the other, S sentences that are told apart by where they start.

    ids: [T] int64.   rows: [T] int64, the sentence of each word.   mask: [B, N] bool, S of them True: where the
    sentences stand in the documents, in the same order.
    """

    ids: Tensor
    rows: Tensor
    mask: Tensor


class SentenceEncoder(nn.Module):
    r"""Words of S sentences -> [S, D].

    \( x_s = \sum_t a_t e_t / \sum_t a_t \) with a learned weight \(a_t = \exp(w_t)\) per word of the vocabulary, so
    that the common words of a sentence do not drown the others. With layers the vectors e_t have seen their sentence.

    Args:
        vocabulary: number of words.   dim: D.   depth: softmax attention layers inside a sentence, 0: none.
        table: an embedding to share; None: one of its own.
        dropout: inside the layers.
    """

    def __init__(
        self, vocabulary: int, dim: int, depth: int = 0, *, table: nn.Embedding | None = None, dropout: float = 0.0
    ):
        super().__init__()
        self.table = nn.Embedding(vocabulary, dim) if table is None else table
        if table is None:
            nn.init.normal_(self.table.weight, std=0.1)
        self.weight = nn.Embedding(vocabulary, 1)
        nn.init.zeros_(self.weight.weight)
        heads = next(h for h in (4, 2, 1) if dim % h == 0)
        softmax = {"variant": "softmax"}
        self.layers = Encoder(dim, depth, heads, softmax, positions="sinusoidal", dropout=dropout) if depth else None

    def forward(self, words: Words) -> Tensor:
        """[S, D]; a sentence without words gives 0."""
        vectors = self.table(words.ids)
        if self.layers is not None:
            vectors = self._attend(vectors, words)
        weights = self.weight(words.ids).clamp(-8, 8).exp()
        size = int(words.mask.sum())
        total = vectors.new_zeros(size, vectors.shape[1]).index_add(
            0, words.rows, (weights * vectors).to(vectors.dtype)
        )
        mass = weights.new_zeros(size, 1).index_add(0, words.rows, weights)
        return total / mass.clamp(min=1e-6)

    def _attend(self, vectors: Tensor, words: Words) -> Tensor:
        """Each sentence a row of its own, padded to the longest."""
        size = int(words.mask.sum())
        counts = torch.bincount(words.rows, minlength=size)
        places = torch.arange(len(words.rows), device=words.rows.device) - (counts.cumsum(0) - counts)[words.rows]
        padded = vectors.new_zeros(size, int(counts.max()), vectors.shape[1])
        padded[words.rows, places] = vectors
        mask = torch.zeros(padded.shape[:2], dtype=torch.bool, device=vectors.device)
        mask[words.rows, places] = True
        assert self.layers is not None
        return self.layers(padded, key_mask=mask)[words.rows, places]


def encode(encoder: Encoder, x: Tensor, mask: Tensor, marked: Tensor | None = None, *, packed: bool = False) -> Tensor:
    """Run an encoder over a batch x [B, N, D] of which `mask` [B, N] is real, padded or laid end to end.

    Packed, projections and MLPs compute no padding, and attention groups documents of like length; what is real comes
    out the same, padding as 0.
    """
    if not packed:
        return encoder(x, key_mask=mask, global_mask=marked)
    offsets = nn.functional.pad(mask.sum(dim=1).cumsum(0), (1, 0))
    inside = None if marked is None else marked[mask].unsqueeze(0)
    return spread(encoder(x[mask].unsqueeze(0), cu_seqlens=offsets, global_mask=inside)[0], mask)


def spread(vectors: Tensor, mask: Tensor) -> Tensor:
    """[S, D] to their places in [B, N, D], 0 elsewhere."""
    out = vectors.new_zeros(*mask.shape, vectors.shape[-1])
    out[mask] = vectors
    return out
