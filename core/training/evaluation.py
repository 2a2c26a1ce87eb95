"""The evaluation pass: one loop for validation during training, for the test at its end, and for `longspan test`.

Lightning's own validation loop is not used: a run that is stopped inside it cannot be resumed bit for bit (2.6 skips
or repeats the validation, depending on where it stopped), and a function that needs no Trainer serves all three.
"""

import math
from contextlib import nullcontext
from typing import Any

import torch
from pytorch_lightning.utilities import move_data_to_device

from core.training.data import Loader
from core.training.errors import RunFailed, UserError
from core.training.interrupt import Stop
from core.training.randomness import own_randomness
from core.training.recipe import Recipe
from core.training.run import local_rank
from core.training.task import Task


def pick_device(recipe: Recipe) -> torch.device:
    """Where the recipe runs in this process.

    Raises:
        UserError: it asks for a GPU and there is none, or for more than there are; or for fp16 without a GPU.
    """
    wanted, devices = recipe.trainer.accelerator, recipe.trainer.devices
    found = torch.cuda.device_count()
    if wanted == "cpu" or (wanted == "auto" and not found):
        if recipe.trainer.precision == "16-mixed":  # Lightning would take bf16 instead
            raise UserError("trainer.precision=16-mixed needs a GPU; on a CPU use 32-true or bf16-mixed")
        return torch.device("cpu")
    if found < devices:
        raise UserError(f"trainer.accelerator={wanted} with trainer.devices={devices}, but torch sees {found} GPUs")
    return torch.device("cuda", local_rank())


def autocast(recipe: Recipe, device: torch.device) -> Any:
    """The arithmetic of `trainer.precision`, for use outside Lightning."""
    dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(recipe.trainer.precision)
    return torch.autocast(device.type, dtype=dtype) if dtype is not None else nullcontext()


def run_evaluation(task: Task, loader: Loader, part: str, stop: Stop) -> dict[str, float]:
    """Metrics of one part of the data, over all its items, with the evaluation weights.

    A pure function of weights and data: whatever the metrics draw at random is drawn from a seed of its own, and the
    generators of training are left where they were.

    Raises:
        RunFailed: a metric is NaN or infinite.
        Interrupted: Ctrl-C or SIGTERM came in between.
    """
    device = next(task.parameters()).device
    with own_randomness(task.recipe.seed, 1), task.evaluating(), autocast(task.recipe, device):
        for batch in loader:
            stop.check()
            task.eval_update(move_data_to_device(batch, device))
        metrics = {name: float(value) for name, value in task.eval_compute().items()}
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise RunFailed(f"{part} {name} is {value}: the model's outputs are no longer numbers", status="nan")
    return metrics
