"""The extractor: sentences to vectors, an encoder of any attention over the whole document, a score per sentence.

    words [B, N, T] -> sentence encoder [B, N, D] + features [B, N, F] -> (question in front) -> encoder -> score [B, N]

Shapes: B documents, N sentences, T words, F features, Q words of the question, D width. A document is one sequence of
its sentences, never cut into pieces: 100,000 words are some 5,000 positions.

Sources:
    sentence and document encoder: Cheng and Lapata 2016, arXiv:1603.07252; Liu and Lapata 2019, arXiv:1908.08345
Where we differ:
    Words are a learned weighted mean unless `sentence_depth` asks for attention, and features stand beside them, since
    data sets of long documents are small.
"""

from typing import Any

import torch
from torch import Tensor, nn

from apps.summarization.sentence_encoder import SentenceEncoder, Words, encode, spread
from core.backbone import Encoder


class Extractor(nn.Module):
    """Scores of sentences.

    Args:
        encoder: keyword arguments of `core.backbone.Encoder`.
        features: F, 0 for none.
        vocabulary: words of the sentence encoder with the unknown one and the padding, 0 for no sentence encoder.
        word_dim: width of a word's vector.   sentence_depth: attention layers inside a sentence.
        query: whether the words of a question stand in front, as global tokens where the attention takes any.
        packed: whether documents are laid end to end for the encoder.
    """

    def __init__(
        self,
        encoder: dict[str, Any],
        *,
        features: int,
        vocabulary: int,
        word_dim: int,
        sentence_depth: int = 0,
        query: bool = False,
        packed: bool = False,
    ):
        super().__init__()
        if not features and not vocabulary:
            raise ValueError("model.words=0 and model.features=false leave nothing to tell sentences apart")
        dim, dropout = encoder["dim"], encoder["dropout"]
        self.features, self.packed = features, packed
        self.sentences = None
        if vocabulary:
            self.sentences = SentenceEncoder(vocabulary, word_dim, sentence_depth, dropout=dropout)
        self.drop = nn.Dropout(dropout)
        self.enter = nn.Linear(features + (word_dim if vocabulary else 0), dim)
        self.query = nn.Embedding(vocabulary, dim, padding_idx=0) if query and vocabulary else None
        if self.query is not None:
            nn.init.normal_(self.query.weight, std=0.1)
        if encoder.get("positions") is None and not features:
            encoder = {**encoder, "positions": "sinusoidal"}  # features say where a sentence stands
        self.encoder = Encoder(**encoder)
        self.takes_global = any("global" in block.attention.variant.can for block in self.encoder)
        self.head = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, 1))

    def forward(self, words: Words, features: Tensor | None, query: Tensor | None = None) -> Tensor:
        """Scores [B, N], -inf where there is no sentence.

        Args:
            words: of the sentences.   features: [B, N, F] or None.   query: [B, Q] words of the question, 0 = padding.
        """
        parts = []
        if features is not None:
            parts.append(features)
        if self.sentences is not None:
            parts.append(spread(self.drop(self.sentences(words)), words.mask))
        x, mask = self.enter(torch.cat(parts, dim=-1)), words.mask
        asked = None if self.query is None else query
        x = encode(self.encoder, x, mask, packed=self.packed) if asked is None else self._asked(x, mask, asked)
        return self.head(x).squeeze(-1).masked_fill(~mask, -torch.inf)

    def score(self, batch: dict[str, Any]) -> Tensor:
        """Scores of the sentences of a batch of `collate_extractive`, [B, N] float32."""
        return self(batch["words"], batch["features"] if self.features else None, batch["query"]).float()

    def _asked(self, x: Tensor, mask: Tensor, query: Tensor) -> Tensor:
        """Encode sentences [B, N, D] behind the words of a question; padding stays at the end of each row."""
        assert self.query is not None
        asked = query != 0
        counts = asked.sum(dim=1, keepdim=True)
        at = torch.arange(query.shape[1] + x.shape[1], device=x.device)
        is_query = at < counts
        is_sentence = (at < counts + mask.sum(dim=1, keepdim=True)) & ~is_query
        both = x.new_zeros(*is_query.shape, x.shape[-1])
        both[is_query] = self.query(query[asked]).to(both.dtype)
        both[is_sentence] = x[mask]
        marked = is_query if self.takes_global else None
        y = encode(self.encoder, both, is_query | is_sentence, marked, packed=self.packed)
        return spread(y[is_sentence], mask)

    def cost(self, sentences: int, words: int) -> dict[str, int]:
        """Parameters, and FLOPs, state bytes and tokens of one document of so many sentences and words."""
        inside = self.encoder.cost(1, sentences)
        around = sum(p.numel() for m in (self.enter, self.head) for p in m.parameters())
        flops = inside.flops + 2 * sentences * around
        if self.sentences is not None:
            flops += 2 * words * self.sentences.table.embedding_dim
            if self.sentences.layers is not None:
                flops += self.sentences.layers.cost(sentences, max(1, words // sentences)).flops
        return {
            "parameters": sum(p.numel() for p in self.parameters()),
            "flops_per_item": int(flops),
            "state_bytes": int(inside.state_bytes),
            "tokens_per_item": words,
        }
