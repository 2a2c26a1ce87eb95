"""What training, validation and test do with a batch of documents."""

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from apps.summarization.abstractive import Writer
from apps.summarization.baselines import budget_of, choose, text_of
from apps.summarization.chooser import worth_of
from apps.summarization.decoding import Speed, write
from apps.summarization.documents import Example
from apps.summarization.extractive import Extractor
from apps.summarization.faithfulness import faithfulness
from apps.summarization.graphs import likeness
from apps.summarization.measuring import measure
from apps.summarization.model import build_model
from apps.summarization.recipe import SummarizationRecipe
from apps.summarization.results import write_results
from apps.summarization.rouge import Scorer, best_of, bootstrap, means
from apps.summarization.selection import lengths_of, select
from apps.summarization.tokens import Tokens
from core.training.files import find_file
from core.training.pretrained import load_pretrained
from core.training.task import Task

log = logging.getLogger(__name__)
MOST_CUT = 0.05
"""Share of summaries cut at the maximum length above which the log warns."""
COMPARED = ("lead", "lexrank")
"""Floors whose difference to the model is taken document by document."""


@dataclass
class Outcome:
    """A summary with what it rests on.

    sentences: numbers, in the document as it was read, of the sentences taken (extractive) or handed on
        (extract_abstract); None: the whole document was read.
    weights: [N] score of each sentence, for extractive models.
    ended: False where the decoder was cut at its maximum length.
    cut: words (extractive) or tokens of the document that were cut off and not read.
    """

    example: Example
    summary: str
    sentences: list[int] | None = None
    weights: np.ndarray | None = None
    ended: bool = True
    cut: int = 0
    seconds: float = 0.0
    scores: dict[str, float] = field(default_factory=dict)


class SummaryTask(Task):
    """Choosing sentences or writing summaries.

    Args:
        recipe: the resolved recipe.
        spec: what `build_data` found: vocabulary or tokenizer, sizes.
    """

    recipe: SummarizationRecipe

    def __init__(self, recipe: SummarizationRecipe, spec: dict[str, Any]):
        super().__init__(recipe, spec)
        self.model = build_model(recipe, spec)
        self.tokens = Tokens(**spec["tokenizer"]) if "tokenizer" in spec else None
        self.budget = budget_of(recipe, spec)
        self.scorer = Scorer()
        self.outcomes: list[Outcome] = []
        self.speed = Speed()
        self.part = ""
        self._references: dict[int, list] = {}

    def bring_weights(self) -> None:
        """Take over the weights of the pretrained run, and those of the extractor that a writer reads through."""
        options = self.recipe.model
        if options.pretrained is not None:
            find_file(options.pretrained, app="summarization", key="model.pretrained")
            log.info("%s: %s", options.pretrained, load_pretrained(self.model, options.pretrained))
        if options.extractor is not None:
            chooser: Any = self.model.chooser
            load_pretrained(chooser.extractor, options.extractor, key="model.extractor")

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Extractive: squared error of standardised worth, or cross-entropy of labels; else of the next token."""
        if not isinstance(self.model, Extractor):
            return self.writer.loss(batch["document"], batch["summary"]), {}
        scores, labels, mask = self.model.score(batch), batch["labels"], batch["words"].mask
        if self.recipe.model.labels == "soft":
            counts = mask.sum(dim=1, keepdim=True)
            mean = (labels * mask).sum(dim=1, keepdim=True) / counts
            centred = (labels - mean) * mask
            deviation = (centred.square().sum(dim=1, keepdim=True) / counts).sqrt()
            target = centred / (deviation + 1e-6)
            losses = (scores.masked_fill(~mask, 0.0) - target).square()
        else:
            losses = F.binary_cross_entropy_with_logits(scores.masked_fill(~mask, 0.0), labels, reduction="none")
        return (losses * mask).sum() / mask.sum(), {}

    def worth(self) -> Any:
        """What scores the sentences that the writer gets to read; None: it reads all."""
        return worth_of(self.recipe.model.kind, getattr(self.model, "chooser", None))

    def summarise(self, batch: dict[str, Any]) -> list[Outcome]:
        """A summary of each document of a batch, as `predict.*` of the recipe says."""
        started = time.perf_counter()
        examples = batch["carried"].examples
        if isinstance(self.model, Extractor):
            found = [self._extract(e, s) for e, s in zip(examples, self.model.score(batch).cpu().double().numpy())]
        else:
            found = self._write(batch, examples)
        for outcome in found:
            outcome.seconds = (time.perf_counter() - started) / len(found)
        return found

    def _extract(self, example: Example, scores: np.ndarray) -> Outcome:
        sentences = example.source.sentences
        scores = scores[: len(sentences)]
        alike = likeness(sentences) if self.budget.redundancy else None
        chosen = select(scores, lengths_of(sentences), self.budget, alike)
        return Outcome(example, text_of(example.source, chosen), chosen, scores, cut=example.source.cut_words)

    def _write(self, batch: dict[str, Any], examples: list[Example]) -> list[Outcome]:
        assert self.tokens is not None
        how = batch["document"], self.recipe.predict, self.spec["max_summary"]
        if isinstance(self.model, Writer):
            cached = all("recurrent" in block.attention.variant.can for block in self.model.decoder)
            written = write(self.model, *how, cached=cached, speed=self.speed)
        else:
            written = self.writer.write(*how, self.speed)
        return [
            Outcome(example, self.tokens.decode(one.tokens), rows, None, one.ended, cut)
            for example, one, rows, cut in zip(examples, written, batch["chosen"], batch["cut"])
        ]

    @property
    def writer(self) -> Any:
        """The model of a task that writes: a `Writer`, or a converted checkpoint that does the same."""
        return self.model

    def eval_update(self, batch: dict[str, Any]) -> None:
        """Summarise and score a batch."""
        if self.part != batch["part"]:
            self.part, self.outcomes, self.speed = batch["part"], [], Speed()
        for outcome in self.summarise(batch):
            example = outcome.example
            if id(example) not in self._references:
                self._references[id(example)] = [self.scorer.prepare(text) for text in example.references]
            outcome.scores = best_of(self.scorer.prepare(outcome.summary), self._references[id(example)])
            self.outcomes.append(outcome)

    def eval_compute(self) -> dict[str, float]:
        """ROUGE x 100 of the pass that ends here; after a test also intervals, faithfulness and cost of decoding."""
        tested, part = self.outcomes, self.part
        rows = [outcome.scores for outcome in tested]
        found = means(rows, intervals=part == "test")
        sizes = [len(outcome.summary.split()) for outcome in tested]
        found["summary_words"] = float(np.mean(sizes))
        if part == "test":
            found |= self._further(tested)
        if self.tokens is not None:
            found["cut_at_maximum"] = float(np.mean([not outcome.ended for outcome in tested]))
            if part == "test" and found["cut_at_maximum"] > MOST_CUT:
                share = f"{found['cut_at_maximum']:.0%}"
                log.warning("%s of the summaries were cut at their maximum length; raise predict.max_tokens", share)
            found["ms_per_token"] = self.speed.ms_per_token
            found["state_kb"] = self.speed.state_bytes / 1024
        self.part = ""
        return found

    def _further(self, tested: list[Outcome]) -> dict[str, float]:
        """What only the test pass tells: faithfulness, and the difference to floors over the same documents."""
        for outcome in tested:
            outcome.scores |= faithfulness(outcome.example.source.text, outcome.summary)
        names = [name for name in tested[0].scores if not name.startswith("rouge")]
        found = {name: float(np.mean([outcome.scores[name] for outcome in tested])) for name in names}
        if self.recipe.data.generated is not None:
            right = [outcome.summary.split() == outcome.example.references[0].split() for outcome in tested]
            found["exact"] = float(np.mean(right))
        for name in COMPARED:
            known: dict[int, str] = {}
            for outcome in tested:
                source = outcome.example.source
                if id(source) not in known:
                    known[id(source)] = text_of(source, choose(name, source, self.budget))
                floor = self.scorer.score(known[id(source)], outcome.example.references)
                outcome.scores |= {f"{metric}_{name}": floor[metric] for metric in ("rouge1", "rouge2")}
            for metric in ("rouge1", "rouge2"):
                difference = np.array([100 * (o.scores[metric] - o.scores[f"{metric}_{name}"]) for o in tested])
                low, high = bootstrap(difference)
                key = f"{metric}_over_{name}"
                found |= {key: float(difference.mean()), f"{key}_low": low, f"{key}_high": high}
        return found

    def cost(self) -> dict[str, Any]:
        """Of one document of middle length."""
        spec = self.spec
        if isinstance(self.model, Extractor):
            return self.model.cost(spec["sentences"], spec["words"])
        return self.writer.cost(spec["tokens"], spec["positions"], spec["summary_tokens"])

    def artifacts(self, run_dir: Path) -> list[Path]:
        """predictions.jsonl, scores.csv, scores by length and by place in the source, the tokenizer, plots."""
        files = write_results(run_dir, self.outcomes, self.scorer.describe(), lambda example: measure(self, example))
        if self.tokens is not None:
            saved = self.tokens.save(run_dir / "tokenizer.json")
            files += [saved] if saved else []
        return files


def build_task(recipe: SummarizationRecipe, spec: dict[str, Any]) -> SummaryTask:
    """The task of a recipe for the data that `spec` describes.

    Raises:
        ValueError: the model cannot be built as the recipe says.
    """
    return SummaryTask(recipe, spec)
