"""The writer: a long document through an encoder of any attention, and a decoder that reads it across.

    tokens [B, M] -> reader -> encoder [B, P, D] -> cross-attention of every decoder block -> next token [B, T, V]

A position of the encoder is a token, a patch of tokens, or a sentence (`reader`). Cross-attention is any variant that
can cross: softmax reads all P positions, hepos P / s per head, linear a state of constant size. With a linear decoder
every step of decoding costs the same; with linear cross-attention the document's length does not matter either.

Shapes: B documents, M source tokens, P positions, T summary tokens, D width, V vocabulary.

Sources:
    head-wise strides: Huang et al. 2021, arXiv:2104.02112; pointer: See et al. 2017, arXiv:1704.04368
Where we differ:
    The pointer attends by one head of its own from the last decoder state to the encoder's positions, so that it is
    there whatever the cross-attention is.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apps.summarization.sentence_encoder import SentenceEncoder, Words, encode, spread
from apps.summarization.tokens import END, PAD
from core.attention.contract import State
from core.backbone import Decoder, Encoder

CONTEXT = "context_"


class Document(NamedTuple):
    """What the encoder reads.

    ids: [B, M] tokens, PAD at the end; of words in sentences where the reader is "sentences": then `words` is given.
    marked: [B, M] bool, tokens that are to be global; None: none.
    """

    ids: Tensor
    words: Words | None = None
    marked: Tensor | None = None


class Memory(NamedTuple):
    """An encoded document: vectors [B, P, D], mask [B, P], and the source tokens [B, M] for the pointer."""

    vectors: Tensor
    mask: Tensor
    ids: Tensor


class Writer(nn.Module):
    """Encoder-decoder for long documents.

    Args:
        vocabulary: V.
        encoder: keyword arguments of `core.backbone.Encoder`.
        decoder: of `core.backbone.Decoder`, `cross` included.
        reader: "tokens", "patches" or "sentences".
        patch: tokens of a patch.   sentence_depth: attention layers inside a sentence (reader "sentences").
        pointer: mix the vocabulary's distribution with one over the tokens of the source.
        smoothing: share of the target spread over the vocabulary.
        packed: whether documents are laid end to end for the encoder.
    """

    def __init__(
        self,
        vocabulary: int,
        encoder: dict[str, Any],
        decoder: dict[str, Any],
        *,
        reader: str = "tokens",
        patch: int = 8,
        sentence_depth: int = 0,
        pointer: bool = False,
        smoothing: float = 0.0,
        packed: bool = False,
    ):
        super().__init__()
        dim = encoder["dim"]
        self.reader, self.patch, self.smoothing, self.packed = reader, patch, smoothing, packed
        self.table = nn.Embedding(vocabulary, dim, padding_idx=PAD)
        nn.init.normal_(self.table.weight, std=dim**-0.5)
        with torch.no_grad():
            self.table.weight[PAD] = 0.0  # in a patch that a document does not fill, padding must be nothing
        self.scale = dim**0.5  # so that an embedding and a position are of one size, as in Vaswani et al. 2017
        self.sentences = self.join = self.level = None
        if reader == "sentences":
            self.sentences = SentenceEncoder(
                vocabulary, dim, sentence_depth, table=self.table, dropout=encoder["dropout"]
            )
            # The mean of many words is short; positions, which are added to it, would drown it.
            self.level = nn.LayerNorm(dim)
        elif reader == "patches":
            self.join = nn.Linear(patch * dim, dim)
        if encoder.get("positions") is None and reader != "sentences":
            encoder = {**encoder, "positions": "sinusoidal"}
        self.encoder = Encoder(**encoder)
        self.decoder = Decoder(**decoder)
        self.takes_global = any("global" in block.attention.variant.can for block in self.encoder)
        self.bias = nn.Parameter(torch.zeros(vocabulary))
        self.point = nn.ModuleDict({"query": nn.Linear(dim, dim), "gate": nn.Linear(dim, 1)}) if pointer else None

    def encode(self, document: Document) -> Memory:
        """Read the document once."""
        ids = document.ids
        if self.sentences is not None and self.level is not None:
            assert document.words is not None
            mask = document.words.mask
            x = spread(self.level(self.sentences(document.words)), mask)
        else:
            mask = ids != PAD
            x = self.table(ids) * self.scale
            if self.join is not None:
                short = -ids.shape[1] % self.patch
                x = F.pad(x, (0, 0, 0, short)).unflatten(1, (-1, self.patch)).flatten(2)
                x = self.join(x)
                mask = F.pad(mask, (0, short)).unflatten(1, (-1, self.patch)).any(dim=-1)
        marked = None
        if self.takes_global and document.marked is not None:
            marked = document.marked
            if self.join is not None:
                marked = F.pad(marked, (0, -ids.shape[1] % self.patch)).unflatten(1, (-1, self.patch)).any(dim=-1)
        return Memory(encode(self.encoder, x, mask, marked, packed=self.packed), mask, ids)

    def forward(self, document: Document, summary: Tensor) -> tuple[Tensor, Memory]:
        """Log-probabilities [B, T, V] of the token after each of `summary` [B, T] (which begins with BEGIN)."""
        memory = self.encode(document)
        states = self.decoder(
            self.table(summary) * self.scale, memory.vectors, key_mask=summary != PAD, context_mask=memory.mask
        )
        return self.predict(states, memory), memory

    def predict(self, states: Tensor, memory: Memory) -> Tensor:
        """Decoder states [B, T, D] -> log-probabilities [B, T, V]; B of the memory may be a divisor (beams)."""
        logits = (states @ self.table.weight.T + self.bias).float()
        logits[..., PAD] = -torch.inf
        written = F.log_softmax(logits, dim=-1)
        if self.point is None:
            return written
        beams = states.shape[0] // memory.vectors.shape[0]
        keys, ids = (x.repeat_interleave(beams, 0) if beams > 1 else x for x in (memory.vectors, memory.ids))
        scores = (self.point["query"](states) @ keys.transpose(1, 2)).float() * keys.shape[-1] ** -0.5
        weights = scores.masked_fill((ids == PAD).unsqueeze(1), -torch.inf).softmax(dim=-1)
        copied = torch.zeros_like(written).scatter_add(2, ids.unsqueeze(1).expand_as(weights), weights)
        gate = self.point["gate"](states).float()
        return torch.logaddexp(written + F.logsigmoid(gate), copied.clamp(min=1e-12).log() + F.logsigmoid(-gate))

    def loss(self, document: Document, summary: Tensor) -> Tensor:
        """Mean negative log-likelihood of the tokens of `summary` [B, T] after the first, smoothed."""
        log_probabilities, _ = self(document, summary[:, :-1])
        targets = summary[:, 1:]
        real = targets != PAD
        # Padding has no likelihood (log 0): another target stands there, whose loss is then not counted.
        right = -log_probabilities.gather(2, targets.masked_fill(~real, END).unsqueeze(2)).squeeze(2)
        # PAD, which cannot be written, has probability 0: it takes no share of the smoothing.
        spread_out = -log_probabilities[..., PAD + 1 :].mean(dim=-1)
        losses = (1 - self.smoothing) * right + self.smoothing * spread_out
        return losses.masked_fill(~real, 0).sum() / real.sum().clamp(min=1)

    def start(self, memory: Memory, beams: int = 1) -> list[State]:
        """Decoding states before the first token, for `beams` hypotheses of each document (side by side)."""
        context, mask = (x.repeat_interleave(beams, 0) if beams > 1 else x for x in (memory.vectors, memory.mask))
        return self.decoder.init_state(len(context), context, mask)

    def step(self, tokens: Tensor, states: list[State], memory: Memory) -> tuple[Tensor, list[State]]:
        """Log-probabilities [B, V] of what follows `tokens` [B], and the new states."""
        y, states = self.decoder.step(self.table(tokens) * self.scale, states)
        return self.predict(y.unsqueeze(1), memory)[:, 0], states

    def cost(self, tokens: int, positions: int, summary: int) -> dict[str, int]:
        """Parameters, and FLOPs, state bytes and tokens of one document of so many tokens and encoder positions."""
        encoder, decoder = self.encoder.cost(1, positions), self.decoder.cost(1, summary, positions)
        flops = encoder.flops + decoder.flops + 2 * summary * self.table.weight.numel()
        if self.join is not None:
            flops += 2 * positions * self.join.weight.numel()
        if self.sentences is not None and self.sentences.layers is not None:
            flops += self.sentences.layers.cost(positions, max(1, tokens // positions)).flops
        return {
            "parameters": sum(p.numel() for p in self.parameters()),
            "flops_per_item": int(flops),
            "state_bytes": int(decoder.state_bytes),
            "tokens_per_item": tokens,
        }


def reorder(states: list[State], rows: Tensor) -> list[State]:
    """States of other hypotheses of the same documents; what is known of a document is the same for all of them."""
    return [
        {name: x if name.startswith(CONTEXT) else x.index_select(0, rows) for name, x in state.items()}
        for state in states
    ]
