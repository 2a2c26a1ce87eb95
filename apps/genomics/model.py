"""The model: tokens in, and by the task one answer per sequence or one per token out.

    ids [B, N] -> letters as mean atoms -> stem of convolutions -> encoder -> (pool) -> head -> answer
              \\-> shortcut: a linear model started at its fit ---------------------->+

Shapes: B sequences, N tokens, D width, K answers (classes, targets, letters). A mask [B, N] is True where a token is
real; padding stands at the end and changes nothing.
"""

from typing import Any

import torch
from torch import Tensor, nn

from apps.genomics.alphabet import ALPHABETS
from apps.genomics.packing import laid_out, offsets, padded_again
from apps.genomics.recipe import LANGUAGE, PER_BASE, GenomicsRecipe
from apps.genomics.shortcuts import Shortcut, build_shortcut
from apps.genomics.strand import chosen, flipped, other_strand
from apps.genomics.tokens import Tokens
from core.backbone import Encoder


class Letters(nn.Module):
    """Embedding of letters: an ambiguous one is the mean of what it may be, so N needs no training.

    Args:
        tokens: character tokens.   dim: D.
    """

    def __init__(self, tokens: Tokens, dim: int):
        super().__init__()
        composition = torch.from_numpy(tokens.alphabet.composition)
        letters, atoms = composition.shape
        whole = torch.zeros(tokens.size, atoms + tokens.size - letters)
        whole[:letters, :atoms] = composition
        whole[letters:, atoms:] = torch.eye(tokens.size - letters)  # MASK, START
        self.register_buffer("composition", whole, persistent=False)
        self.weight = nn.Parameter(torch.randn(whole.shape[1], dim))

    def forward(self, ids: Tensor) -> Tensor:
        """[B, N] -> [B, N, D]."""
        return (self.composition @ self.weight)[ids]  # type: ignore[operator]


class Stem(nn.Module):
    """Convolutions over neighbouring tokens, each added to what it read.

    Args:
        dim: D.   widths: tokens that each layer sees.   causal: see the past only.   dropout: on what is added.
    """

    def __init__(self, dim: int, widths: list[int], causal: bool, dropout: float):
        super().__init__()
        self.causal = causal
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in widths)
        self.layers = nn.ModuleList(nn.Conv1d(dim, dim, width) for width in widths)
        self.drop = nn.Dropout(dropout)

    @property
    def reach(self) -> int:
        """Tokens before a position that it can see."""
        return sum(layer.kernel_size[0] - 1 for layer in self.layers)  # type: ignore[index, operator]

    @property
    def gap(self) -> int:
        """Empty places between two sequences of one row, so that neither sees the other."""
        widest: int = max(layer.kernel_size[0] for layer in self.layers)  # type: ignore[index, operator, assignment]
        return widest - 1 if self.causal else widest // 2

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]; a masked token counts as 0."""
        for norm, layer in zip(self.norms, self.layers):
            width: int = layer.kernel_size[0]  # type: ignore[index, assignment]
            left = width - 1 if self.causal else (width - 1) // 2
            y = (norm(x) * mask.unsqueeze(-1)).transpose(1, 2)
            y = layer(nn.functional.pad(y, (left, width - 1 - left)))
            x = x + self.drop(nn.functional.gelu(y).transpose(1, 2))
        return x


class SequenceModel(nn.Module):
    """Answers about sequences, or about each of their tokens.

    Args:
        recipe: the resolved recipe.
        spec: what `build_data` found: task, names, tokens, length, shortcut.

    Raises:
        ValueError: a pool that needs sequences of one length where they are not, or what the encoder refuses.
    """

    complement: Tensor
    mirror: Tensor

    def __init__(self, recipe: GenomicsRecipe, spec: dict[str, Any]):
        super().__init__()
        backbone, model, task = recipe.backbone, recipe.model, recipe.task
        self.tokens = Tokens.from_spec(spec["tokens"])
        self.task, self.strand, self.pool, self.fixed = task, model.strand, model.pool, spec["fixed"]
        self.per_token, self.causal = task in PER_BASE or task in LANGUAGE, task == "causal"
        self.packing, self.hidden_share = recipe.data.packing, model.hidden_share
        dim, outputs = backbone.dim, self.tokens.targets if task in LANGUAGE else len(spec["names"])
        if self.fixed is None and not self.per_token and self.pool == "flat":
            raise ValueError("model.pool=flat needs sequences of one length, and these differ; use mean or attend")
        self.embed: nn.Module = (
            Letters(self.tokens, dim) if self.tokens.is_char else nn.Embedding(self.tokens.size, dim)
        )
        self.stem = Stem(dim, model.stem, self.causal, backbone.dropout) if model.stem else None
        options = {**backbone.model_dump(), "attention": recipe.attention}
        if options["positions"] is None:
            options["positions"] = self._positions(bool(model.stem))
        self.encoder = Encoder(**options, causal=self.causal, max_length=spec["longest"])
        self.query = nn.Linear(dim, 1) if self.pool == "attend" and not self.per_token else None
        self.drop = nn.Dropout(backbone.dropout)
        self.head = nn.Linear(dim * self._places(), outputs)
        self.shortcut: Shortcut | None = build_shortcut(spec, outputs, model.shortcut_frozen)
        if self.shortcut is not None:
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)
        self._strands(spec, outputs)

    def _places(self) -> int:
        """Vectors that the head reads at once."""
        if self.per_token:
            return 2 if self.strand == "tied" else 1
        return self.fixed if self.pool == "flat" and self.fixed is not None else 1

    def _positions(self, stem: bool) -> str | None:
        if self.causal:
            return None  # a causal model knows the order from what each position sees
        if self.fixed is not None:
            return "learned"
        return None if stem else "sinusoidal"

    def _strands(self, spec: dict[str, Any], outputs: int) -> None:
        """Which id pairs with which, and which answer per base the other strand gives."""
        complement, mirror = torch.arange(self.tokens.size), torch.arange(outputs)
        pairs = ALPHABETS[spec["tokens"]["alphabet"]].complement
        if pairs is not None and self.tokens.is_char:
            complement[: len(pairs)] = torch.from_numpy(pairs.astype("int64"))
        if self.task in LANGUAGE and self.tokens.is_char:
            mirror = complement[:outputs].clone()
        elif spec.get("mirror") is not None:
            mirror = torch.tensor(spec["mirror"])
        self.register_buffer("complement", complement, persistent=False)
        self.register_buffer("mirror", mirror, persistent=False)

    def hidden(self, ids: Tensor, mask: Tensor) -> Tensor:
        """What the encoder makes of the tokens of one strand, [B, N, D]."""
        whole = bool(mask.all())
        if self.packing and not whole:
            row, real = laid_out(ids, mask, self.stem.gap if self.stem is not None else 0)
            x = self.encoder(self.embedded(row, real)[:, real[0]], cu_seqlens=offsets(mask))
            return padded_again(x, mask)
        return self.encoder(self.embedded(ids, mask), key_mask=None if whole else mask)

    def embedded(self, ids: Tensor, mask: Tensor) -> Tensor:
        """What goes into the encoder, [B, N, D]."""
        x = self.embed(ids)
        return x if self.stem is None else self.stem(x, mask)

    def pooled(self, x: Tensor, mask: Tensor) -> Tensor:
        """One vector per sequence, [B, N, D] -> [B, D] (flat: [B, N * D])."""
        real = mask.unsqueeze(-1)
        if self.pool == "flat":
            return x.flatten(1)
        if self.pool == "max":
            return x.masked_fill(~real, -torch.inf).amax(1)
        if self.query is not None:
            weights = self.query(x).masked_fill(~real, -torch.inf).softmax(1)
            return (weights * x).sum(1)
        return (x * real).sum(1) / real.sum(1)

    def forward(
        self, ids: Tensor, mask: Tensor, other_ids: Tensor | None = None, other_mask: Tensor | None = None
    ) -> Tensor:
        """Answers [B, K], or [B, N, K] per token, in the direction of the sequence as it was given.

        Args:
            ids, mask: [B, N]. A causal model is given tokens that are shifted by one already.
            other_ids, other_mask: the other strand, where it cannot be worked out from the tokens.
        """
        if self.strand == "none" or self.causal or (self.strand == "augment" and not self.training):
            return self.answer(ids, mask)
        if other_ids is None or other_mask is None:
            assert self.tokens.is_char, "the other strand of tokens of several letters has to be given"
            other_ids, other_mask = other_strand(ids, mask, self.complement), mask
        if self.strand == "tied":
            return self._tied(ids, mask, other_ids, other_mask)
        if not self.training:
            return (self.answer(ids, mask) + self._back(self.answer(other_ids, other_mask), mask)) / 2
        coin = (torch.rand(len(ids)) < 0.5).to(ids.device)
        if other_ids.shape != ids.shape:  # pieces of the other strand: pad both alike
            ids, mask, other_ids, other_mask = _alike(ids, mask, other_ids, other_mask)
        mask = chosen(coin, mask, other_mask)
        answer = self.answer(chosen(coin, ids, other_ids), mask)
        return chosen(coin, answer, self._back(answer, mask)) if self.per_token else answer

    def answer(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The answer of one strand, in its own direction."""
        x = self.hidden(self._shown(ids), mask)
        y = self.head(self.drop(x if self.per_token else self.pooled(x, mask)))
        return y if self.shortcut is None else y + self.shortcut(ids, mask)

    def _tied(self, ids: Tensor, mask: Tensor, other_ids: Tensor, other_mask: Tensor) -> Tensor:
        """Both strands read with the same weights; per token g(a, b) + mirrored g(b, a) is equivariant for any g."""
        ours, theirs = self.hidden(self._shown(ids), mask), self.hidden(self._shown(other_ids), other_mask)
        if self.per_token:
            theirs = flipped(theirs, mask)
            y = self.head(self.drop(torch.cat([ours, theirs], -1)))
            y = (y + self.head(self.drop(torch.cat([theirs, ours], -1)))[..., self.mirror]) / 2
        else:
            y = self.head(self.drop((self.pooled(ours, mask) + self.pooled(theirs, other_mask)) / 2))
        if self.shortcut is not None:
            other = self._back(self.shortcut(other_ids, other_mask), mask)
            y = y + (self.shortcut(ids, mask) + other) / 2
        return y

    def _shown(self, ids: Tensor) -> Tensor:
        """Tokens that the network is shown: in training, `hidden_share` of them are the mask."""
        if self.hidden_share is None or not self.training:
            return ids
        return ids.masked_fill(torch.rand(ids.shape, device=ids.device) < self.hidden_share, self.tokens.mask)

    def _back(self, answer: Tensor, mask: Tensor) -> Tensor:
        """An answer about the other strand as one about the strand that was given."""
        return flipped(answer, mask)[..., self.mirror] if self.per_token else answer

    def cost(self, length: int) -> dict[str, int]:
        """Parameters, and FLOPs (forward), state bytes and tokens of one sequence of `length` tokens."""
        inside = self.encoder.cost(1, length)
        around = 2 * self.head.weight.numel() * (length if self.per_token else 1)
        if self.stem is not None:
            around += 2 * length * sum(layer.weight.numel() for layer in self.stem.layers)  # type: ignore[union-attr, operator]
        strands = 2 if self.strand == "tied" else 1
        return {
            "parameters": sum(p.numel() for p in self.parameters()),
            "flops_per_item": int(strands * (inside.flops + around)),
            "state_bytes": int(inside.state_bytes),
            "tokens_per_item": length,
        }


def _alike(ids: Tensor, mask: Tensor, other_ids: Tensor, other_mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both strands padded to the longer of the two."""
    longest = max(ids.shape[1], other_ids.shape[1])
    ids, mask, other_ids, other_mask = (
        nn.functional.pad(x, (0, longest - x.shape[1])) for x in (ids, mask, other_ids, other_mask)
    )
    return ids, mask, other_ids, other_mask


def build_model(recipe: GenomicsRecipe, spec: dict[str, Any]) -> SequenceModel:
    """The model of a recipe, for the data that `spec` describes.

    Raises:
        ValueError: a combination that cannot be built.
    """
    return SequenceModel(recipe, spec)
