"""Language models: reading on from left to right (causal), or filling in what was masked."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from apps.genomics.metrics import language_figures
from apps.genomics.recipe import GenomicsRecipe
from apps.genomics.results import write_language
from apps.genomics.strand import chosen, other_strand
from apps.genomics.strata import write_strata
from apps.genomics.task import GenomicsTask
from core.training.scores import Scores

KEPT, REPLACED = 0.1, 0.1
"""Of the tokens that a masked model is asked, so many are left as they are and so many replaced by a random one."""


class LanguageTask(GenomicsTask):
    """Perplexity is per base, whatever the tokens are; that of a masked model is another thing and has another name."""

    bases: Tensor

    def __init__(self, recipe: GenomicsRecipe, spec: dict[str, Any]):
        super().__init__(recipe, spec)
        self.causal = recipe.task == "causal"
        self.prefix = "" if self.causal else "masked_"
        self.register_buffer("bases", torch.from_numpy(self.model.tokens.bases), persistent=False)
        self.start_pass("")

    def start_pass(self, part: str) -> None:
        """Forget what the last pass kept."""
        self.nats: list[np.ndarray] = []
        self.counts: list[np.ndarray] = []
        self.asked: list[np.ndarray] = []
        self.right = 0

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean cross-entropy of the tokens that are asked."""
        ids, mask = batch["ids"], batch["mask"]
        if self.causal and self.model.strand != "none":
            coin = (torch.rand(len(ids)) < 0.5).to(ids.device)
            turned = other_strand(ids, mask, self.model.complement)
            ids = chosen(coin, ids, turned)
            # What is context on one strand is so on the other: stretches of training are asked everywhere.
        if self.causal:
            logits, asked = self.next_logits(ids, mask), mask & (ids < self.model.tokens.targets)
            asked = asked if self.model.strand != "none" else asked & batch["scored"]
        else:
            inputs, asked = self.corrupted(ids, batch["scored"])
            logits = self.model(inputs, mask).float()
        if not bool(asked.any()):
            return logits.sum() * 0.0, {}
        return F.cross_entropy(logits[asked], ids[asked]), {}

    def next_logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Logits [B, N, K] of each token given those before it."""
        start = torch.full_like(ids[:, :1], self.model.tokens.start)
        return self.model(torch.cat([start, ids[:, :-1]], 1), mask).float()

    def corrupted(self, ids: Tensor, may: Tensor) -> tuple[Tensor, Tensor]:
        """Input with a share of its tokens masked, replaced or kept, and which ones are asked.

        Draws from torch's generator on the CPU, so that a resumed run draws on.
        """
        tokens = self.model.tokens
        draw = torch.rand(ids.shape).to(ids.device)
        asked = may & (draw < self.recipe.model.mask_share)
        kind = torch.rand(ids.shape).to(ids.device)
        anything = torch.randint(tokens.targets, ids.shape).to(ids.device)
        inputs = torch.where(asked & (kind < 1 - KEPT - REPLACED), tokens.mask, ids)
        replaced = asked & (kind >= 1 - KEPT - REPLACED) & (kind < 1 - KEPT)
        return torch.where(replaced, anything, inputs), asked

    def eval_update(self, batch: dict[str, Any]) -> None:
        """Add up nats and bases of each stretch."""
        self._enter(batch)
        ids, mask = batch["ids"], batch["mask"]
        asked = batch["scored"]
        if self.causal:
            logits = self.next_logits(ids, mask)
        else:
            # Only masks: a token that is left as it is tells itself, and a floor is not told it.
            _, asked = self.corrupted(ids, asked)
            logits = self.model(torch.where(asked, self.model.tokens.mask, ids), mask).float()
        nats = F.cross_entropy(logits.transpose(1, 2), ids.clamp(max=logits.shape[-1] - 1), reduction="none")
        self.nats.append((nats * asked).double().sum(1).cpu().numpy())
        self.counts.append((self.bases[ids] * asked).sum(1).cpu().numpy())
        self.right += int(((logits.argmax(-1) == ids) & asked).sum())
        self.asked.append(asked.sum(1).cpu().numpy())

    def eval_compute(self) -> dict[str, float]:
        """Perplexity, nats and bits per base, and the share of tokens that were guessed."""
        is_test, self.part = self.part == "test", ""
        nats, bases, asked = (np.concatenate(part) for part in (self.nats, self.counts, self.asked))
        self.tested = nats, bases
        tokens = None if self.model.tokens.is_char else asked
        found = language_figures(nats, bases, is_test, self.prefix, tokens=tokens)
        return found | {f"{self.prefix}accuracy": self.right / max(1, asked.sum())}

    def artifacts(self, run_dir: Path) -> list[Path]:
        """Bits per base of every stretch of the test part."""
        nats, bases = self.tested

        def score(items: np.ndarray) -> Scores:
            return {"bits_per_base": float(nats[items].sum() / max(1, bases[items].sum()) / np.log(2))}

        return write_language(run_dir, nats, bases) + write_strata(run_dir, np.concatenate(self.traits), score)
