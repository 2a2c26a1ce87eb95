import os
import random
import signal
import time

import numpy as np
import torch
from torch import nn

from core.training.task import Task


class ToyTask(Task):
    def __init__(self, recipe, spec):
        super().__init__(recipe, spec)
        if spec["width"] % 2:
            raise ValueError(f"toy width must be even, got {spec['width']}")
        self.model = nn.Sequential(nn.Linear(spec["width"], 16), nn.LayerNorm(16), nn.Linear(16, 1))
        kind, _, at = (recipe.model.trap or "none@-1").partition("@")
        self.trap, self.trap_at, self.calls, self.evaluated = kind, int(at), 0, 0
        self.start_evaluation()

    def start_evaluation(self):
        self.total, self.count = 0.0, 0

    def loss(self, batch):
        x, y = batch
        # Three generators take part, so that a resumed run is bit-exact only if all three were restored.
        p = self.recipe.model.dropout
        if not self.recipe.model.quiet:
            x = nn.functional.dropout(x, p) * (1 + 0.01 * random.random()) + 0.01 * np.random.rand()
        out = self.model(x)
        loss = ((out - y) ** 2).mean()
        return self.spring(loss), {"out": out.detach().mean()}

    def spring(self, loss):
        self.calls += 1
        if self.trap == "slow":
            time.sleep(0.02)
        if self.calls - 1 != self.trap_at:
            return loss
        if self.trap == "nan":
            return loss * float("nan")
        if self.trap == "grad":
            return loss + torch.sqrt(self.model[0].weight.abs().sum() * 0)
        if self.trap == "oom":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        if self.trap in ("kill", "term", "int"):
            os.kill(os.getpid(), {"kill": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT}[self.trap])
        return loss

    def eval_update(self, batch):
        x, y = batch
        self.evaluated += 1
        if self.trap == "termval" and self.evaluated - 1 == self.trap_at:
            os.kill(os.getpid(), signal.SIGTERM)
        if self.trap == "nanval" and self.evaluated - 1 == self.trap_at:
            y = y * float("nan")
        self.total += float(((self.model(x) - y) ** 2).sum())
        self.count += len(x)

    def eval_compute(self):
        mse = self.total / self.count
        if self.recipe.model.best_epoch is not None:
            mse = 1.0 + abs(self.current_epoch - self.recipe.model.best_epoch)
        self.start_evaluation()
        return {"mse": mse} if self.recipe.model.judge is None else {"mse": mse, self.recipe.model.judge: -mse}

    def cost(self):
        parameters = sum(p.numel() for p in self.model.parameters())
        return {"parameters": parameters, "flops_per_item": 2 * parameters, "state_bytes": 0, "tokens_per_item": 1}

    def artifacts(self, run_dir):
        if self.trap == "termend":
            os.kill(os.getpid(), signal.SIGTERM)
        path = run_dir / "plots" / "toy.csv"
        path.parent.mkdir(exist_ok=True)
        path.write_text("plotted\n")
        return [path]


def build_task(recipe, spec):
    return ToyTask(recipe, spec)


def predict(run, input, output):
    x = torch.tensor([float(word) for word in input.read_text().split()]).view(-1, run.spec["width"])
    with torch.no_grad():
        values = (run.recipe.predict.scale * run.task.model(x)).flatten().tolist()
    output.write_text("\n".join(map(str, values)))
    return [output]


def inspect(run, input, output):
    path = output / "weights.txt"
    path.write_text(f"{run.recipe.predict.scale} {input.name}")
    return [path]
