"""Who chooses the sentences that a writer reads (extract_abstract): a trained extractor of yours, else LexRank.

The extractor is frozen and lies inside the writer's model, so that its weights travel in the checkpoint and the run
folder alone is enough for `predict`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from apps.summarization.documents import Example
from apps.summarization.extractive import Extractor
from apps.summarization.features import query_features
from apps.summarization.graphs import lexrank
from apps.summarization.items import ExtractiveItems, collate_extractive
from core.training.errors import UserError
from core.training.files import find_file
from core.training.run import load_run


class Chooser(nn.Module):
    """A trained extractor that learns no more.

    Args:
        extractor: the model.   spec: of the data that it was trained on.
    """

    def __init__(self, extractor: Extractor, spec: dict[str, Any]):
        super().__init__()
        self.extractor, self.spec = extractor.requires_grad_(False), spec

    @torch.no_grad()
    def scores(self, example: Example) -> np.ndarray:
        """[N], larger is better."""
        self.eval()
        batch = collate_extractive([ExtractiveItems([example], self.spec, None, "chooser")[0]])
        return self.extractor.score(batch)[0].double().numpy()


def central(example: Example) -> np.ndarray:
    """[N] by LexRank, with likeness to the question where there is one."""
    scores = lexrank(example.source.sentences)
    scores = scores / max(scores.max(), 1e-12)
    if example.query:
        likeness = query_features(example.source.sentences, example.query)[:, 0]
        scores = scores + np.exp(likeness - max(likeness.max(), 1e-12))
    return scores


def worth_of(kind: str, chooser: Chooser | None) -> Callable[[Example], np.ndarray] | None:
    """What scores the sentences for a writer of this `model.kind`; None: it reads all of them."""
    if kind != "extract_abstract":
        return None
    return central if chooser is None else chooser.scores


def load_chooser(path: str) -> tuple[Chooser, dict[str, Any]]:
    """The extractor of a run, and what it takes to build it again without the run.

    Raises:
        UserError: no such run, or one of another kind.
    """
    run = load_run(find_file(path, app="summarization", key="model.extractor"))
    model = run.task.model
    if not isinstance(model, Extractor):
        kind = run.recipe.model.kind if run.app.name == "summarization" else run.app.name  # type: ignore[attr-defined]
        raise UserError(f"model.extractor: {Path(path)} is a run of {kind}; name one of kind=extractive")
    known = {"source": run.recipe.source, "recipe": run.recipe.model_dump(mode="json"), "spec": run.spec}
    return Chooser(model, run.spec), known
