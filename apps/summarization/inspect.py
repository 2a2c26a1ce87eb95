"""What a summary rests on inside the model: attributions to the sentences of a user's document, on a page.

    a_n = | sum over the entries of sentence n of  x . dy/dx |

with y the scores of the chosen sentences (extractive) or the log-probability of the written summary (abstractive), and
x what enters the encoder. It needs gradients alone, so it is there for any attention, also where no weights exist.

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
from apps.summarization.items import AbstractiveItems, ExtractiveItems, collate_abstractive, collate_extractive
from apps.summarization.page import write_page
from apps.summarization.predict import summarise_file
from apps.summarization.task import Outcome, SummaryTask
from apps.summarization.tokens import BEGIN, END
from core.training.errors import UserError
from core.training.run import LoadedRun

MOST = 20
"""Documents on a page."""


def inspect(run: LoadedRun, input: Path, output: Path) -> list[Path]:
    """Write `summaries.html` and `attributions.jsonl` (a line per document: weight of each sentence) into a folder.

    Args:
        run: the trained run.   input: as for `predict`; the first 20 documents are shown.   output: the folder.
    """
    task = run.task
    assert isinstance(task, SummaryTask)
    outcomes = summarise_file(run, input)[0][:MOST]
    heats = [attribution(task, outcome) for outcome in outcomes]
    page, table = output / "summaries.html", output / "attributions.jsonl"
    scaled = [heat / max(float(np.quantile(heat, 0.98)), 1e-12) for heat in heats]
    note = "Depth of blue: how much a sentence moves what was chosen or written (gradient times input)."
    write_page(page, outcomes, scaled, [note] * len(outcomes))
    with table.open("w") as file:
        for outcome, heat in zip(outcomes, heats):
            row = {"id": outcome.example.id, "attribution": [round(float(a), 6) for a in heat]}
            file.write(json.dumps(row) + "\n")
    return [page, table]


def attribution(task: SummaryTask, outcome: Outcome) -> np.ndarray:
    """[N] weights of the sentences of the outcome's document, not negative, in no unit; 0 for what was not read."""
    example = outcome.example
    found = np.zeros(len(example.source.sentences))
    if isinstance(task.model, Extractor):
        item = ExtractiveItems([example], task.spec, None, "inspect")[0]
        model, batch = task.model, collate_extractive([item])
        weights = _gradient(model.enter, lambda: model.score(batch)[0, outcome.sentences or []].sum())
        return weights[0].numpy()[: len(found)]
    if not isinstance(task.model, Writer) or task.tokens is None:
        raise UserError("a converted checkpoint has nothing to inspect yet; predict gives its summaries")
    model = task.model
    item = AbstractiveItems([example], task.spec, "inspect", task.worth())[0]
    batch = collate_abstractive([item])
    written = torch.tensor([[BEGIN, *task.tokens.encode(outcome.summary)[: task.spec["max_summary"]], END]])
    weights = _gradient(model.table, lambda: -model.loss(batch["document"], written), keep_sign=True)
    flat = weights.flatten().numpy()
    owners = item["owners"]
    np.add.at(found, owners[owners >= 0], flat[: len(owners)][owners >= 0])
    return np.abs(found)


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
