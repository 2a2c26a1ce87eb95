"""Small recipes and tasks that the tests of genomics share."""

import numpy as np
import pytest
import torch

from apps.genomics.data import build_data
from apps.genomics.task import build_task
from core.training.recipe import build_recipe

SMALL = {
    "backbone": {"depth": 2, "dim": 16, "heads": 2, "mlp_dim": 16},
    "trainer": {"max_steps": 2, "batch_size": 8, "accelerator": "cpu", "threads": 1},
}


@pytest.fixture(scope="session")
def letters():
    """letters(count, length, alphabet, seed): random sequences."""

    def make(count, length, alphabet="ACGT", seed=0):
        random = np.random.default_rng(seed)
        sizes = length if isinstance(length, (list, tuple)) else [length] * count
        return ["".join(random.choice(list(alphabet), size)) for size in sizes]

    return make


@pytest.fixture(scope="session")
def recipe():
    """recipe(task, data, model, overrides): a small one."""

    def make(task, data, model=None, overrides=(), **more):
        values = {"app": "genomics", "task": task, "data": data, "model": model or {}, **SMALL, **more}
        return build_recipe(values, list(overrides))

    return make


@pytest.fixture(scope="session")
def built(recipe):
    """built(...): as recipe(...), with data, and a task in evaluation mode whose head does not start at zero."""

    def make(*args, **kwargs):
        torch.manual_seed(0)
        made = recipe(*args, **kwargs)
        data = build_data(made)
        task = build_task(made, data.spec)
        with torch.no_grad():  # heads of shortcuts start at zero, which would hide what stands before them
            for weight in task.model.head.parameters():
                weight.normal_(0, 0.3)
        return made, data, task.eval()

    return make
