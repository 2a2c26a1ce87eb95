"""What a summary rests on inside the model: attributions to the sentences of a document, and attention, on a page.

    attribution  a_n = | sum over the entries of sentence n of  x . dy/dx |
    attention    weight that the chosen sentences, or the written tokens, give to sentence n: mean of heads and layers

with y the scores of the chosen sentences (extractive) or the log-probability of the written summary (abstractive), and
x what enters the encoder. Attributions need gradients alone, and rows of attention are asked of what each mechanism
computes (`core.attention.maps`), so both are there for any attention, also where no weights exist. Attention is that
between sentences in the document encoder, or that of the writer's decoder across; a converted checkpoint has
attributions alone.

Source:
    gradient times input: Shrikumar et al. 2016, arXiv:1605.01713
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from apps.summarization.abstractive import Writer
from apps.summarization.extractive import Extractor
from apps.summarization.items import AbstractiveItems, collate_abstractive
from apps.summarization.measuring import batch_of
from apps.summarization.page import Layer, write_page
from apps.summarization.predict import summarise_file
from apps.summarization.task import Outcome, SummaryTask
from apps.summarization.tokens import BEGIN, END
from core.attention.maps import attention_rows
from core.training.run import LoadedRun

MOST = 20
"""Documents on a page."""
NOTES = {
    "attribution": "how much a sentence moves what was chosen or written (gradient times input)",
    "attention": "how much of the attention a sentence gets from what was chosen or written (mean of heads and layers)",
}


def inspect(run: LoadedRun, input: Path, output: Path) -> list[Path]:
    """Write `summaries.html` and `attributions.jsonl` (a line per document: weights of each sentence) into a folder.

    Args:
        run: the trained run.   input: as for `predict`; the first 20 documents are shown.   output: the folder.
    """
    task = run.task
    assert isinstance(task, SummaryTask)
    outcomes = summarise_file(run, input)[0][:MOST]
    found = [look(task, outcome) for outcome in outcomes]
    page, table = output / "summaries.html", output / "attributions.jsonl"
    layers = [
        [Layer(name, _scaled(heat, outcome), NOTES[name]) for name, heat in heats.items()]
        for heats, outcome in zip(found, outcomes)
    ]
    write_page(page, outcomes, layers)
    with table.open("w") as file:
        for outcome, heats in zip(outcomes, found):
            plain = {name: [round(float(a), 6) for a in heat] for name, heat in heats.items()}
            file.write(json.dumps({"id": outcome.example.id} | plain) + "\n")
    return [page, table]


def look(task: SummaryTask, outcome: Outcome) -> dict[str, np.ndarray]:
    """ "attribution" and, where our own model attends, "attention": [N] weights of the sentences of the outcome's
    document, not negative, in no unit; 0 for what was not read."""
    if isinstance(task.model, Extractor):
        return _look_extractive(task.model, task, outcome)
    return _look_written(task, outcome)


def _look_extractive(model: Extractor, task: SummaryTask, outcome: Outcome) -> dict[str, np.ndarray]:
    model.packed = False  # rows of attention are asked of plain batches; the results are the same
    batch, chosen = batch_of(task, outcome.example), outcome.sentences or []
    size = len(outcome.example.source.sentences)
    weights = _gradient(model.enter, lambda: model.score(batch)[0, chosen].sum())
    front = 0 if model.query is None else int((batch["query"] != 0).sum())
    rows = attention_rows(model.encoder, lambda: model.score(batch), [front + i for i in chosen])
    return {"attribution": weights[0].numpy()[:size], "attention": _mean(rows)[front : front + size]}


def _look_written(task: SummaryTask, outcome: Outcome) -> dict[str, np.ndarray]:
    assert task.tokens is not None
    model: Any = task.model
    item = AbstractiveItems([outcome.example], task.spec, "inspect", task.worth())[0]
    document = collate_abstractive([item])["document"]
    written = torch.tensor([[BEGIN, *task.tokens.encode(outcome.summary)[: task.spec["max_summary"]], END]])
    table = model.table if isinstance(model, Writer) else model.inner.get_encoder().get_input_embeddings()
    flat = _gradient(table, lambda: -model.loss(document, written), keep_sign=True).flatten().numpy()
    size, owners = len(outcome.example.source.sentences), item["owners"]
    if not isinstance(model, Writer):
        return {"attribution": np.abs(_by_sentence(flat[model.front :][: len(owners)], owners, size))}
    model.packed = False
    rows = attention_rows(model.decoder, lambda: model(document, written[:, :-1]), range(written.shape[1] - 1))
    across = _mean({name: one for name, one in rows.items() if ".cross." in name})
    # A position of the encoder is a token, `patch` of them, or those of a piece of a sentence: they share its weight.
    at = np.arange(len(owners)) // (model.patch if model.reader == "patches" else 1)
    at = item["rows"].numpy() if model.reader == "sentences" else at
    share = (across / np.maximum(np.bincount(at, minlength=len(across)), 1))[at]
    return {
        "attribution": np.abs(_by_sentence(flat[: len(owners)], owners, size)),
        "attention": _by_sentence(share, owners, size),
    }


def _mean(rows: dict[str, Tensor]) -> np.ndarray:
    """[M], not negative: the mean over mechanisms, heads and queries of rows [1, H, Q, M]."""
    return torch.stack([one[0].abs().mean(dim=(0, 1)) for one in rows.values()]).mean(dim=0).numpy()


def _by_sentence(weights: np.ndarray, owners: np.ndarray, size: int) -> np.ndarray:
    """Sums of the weights of tokens by the sentence that each belongs to; owner -1 (the question) belongs to none."""
    return np.bincount(owners[owners >= 0], weights=weights[owners >= 0], minlength=size)


def _scaled(heat: np.ndarray, outcome: Outcome) -> np.ndarray:
    """Full depth at the top 2 % of what the page does not mark anyway: chosen sentences would outshine the others."""
    rest = np.delete(heat, outcome.sentences or []) if outcome.weights is not None else heat
    return heat / max(float(np.quantile(rest, 0.98)) if len(rest) else 0.0, 1e-12)


def _gradient(module: nn.Module, run: Any, *, keep_sign: bool = False) -> Tensor:
    """Output of a module times the gradient of `run()` by it, summed over the width; its first call counts."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Tensor) -> Tensor | None:
        if seen:
            return None
        seen.append(output.detach().requires_grad_())
        return seen[0]

    handle = module.register_forward_hook(keep)
    try:
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(run(), seen[0])
    finally:
        handle.remove()
    product = (gradient * seen[0]).sum(dim=-1).detach()
    return product if keep_sign else product.abs()
