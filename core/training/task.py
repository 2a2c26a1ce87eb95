"""The task: what an app's model learns, as a LightningModule that owns everything which all apps do alike."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from core.training.errors import RunFailed
from core.training.optim import WeightAverage, build_optimizer, build_scheduler
from core.training.recipe import Recipe


class Task(pl.LightningModule):
    """Base of every app's task; a subclass builds `self.model` and says what loss and metrics are.

    A subclass implements `loss`, `eval_update`, `eval_compute`, `cost`, and `artifacts` if it has any. It keeps all
    that is learned in `self.model`, which is what `model.safetensors` holds and `load_model` returns.

    Args:
        recipe: the resolved recipe.
        spec: `Data.spec`, plain JSON types.
    """

    model: nn.Module

    def __init__(self, recipe: Recipe, spec: dict[str, Any]):
        super().__init__()
        self.recipe = recipe
        self.spec = spec
        self.total_steps = 1  # of the whole run; `fit` knows it when the data is there
        self.average: WeightAverage | None = None
        self.loss_sum: Tensor | None = None  # over the batches of this epoch; stays on the device, read once
        self.extra_sums: dict[str, Tensor] = {}
        self.extra_counts: dict[str, int] = {}  # batches that reported the extra: not all need to
        self.batches = 0
        self._last_loss = torch.tensor(0.0)
        self._last_norm = math.nan
        self._unread: tuple[Tensor, Tensor, int, int] | None = None

    # -- what an app implements ------------------------------------------------------------------------------------

    def bring_weights(self) -> None:
        """Bring in the weights that the recipe starts from, if any; called once, before a new run trains.

        A run that is resumed or loaded has all its weights in its checkpoint, so their source may be gone by then.

        Raises:
            UserError: they are not there or do not fit.
        """

    def loss(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Training loss of a batch (a mean, scalar) and further scalars worth a column in metrics.csv."""
        raise NotImplementedError

    def eval_update(self, batch: Any) -> None:
        """Take a batch of the val or test part into the running metrics, which are sums over samples."""
        raise NotImplementedError

    def eval_compute(self) -> dict[str, float]:
        """The metrics since the last call, the app's primary one among them; starts anew."""
        raise NotImplementedError

    def cost(self) -> dict[str, Any]:
        """`parameters`, `flops_per_item` (forward), `state_bytes`, `tokens_per_item`."""
        raise NotImplementedError

    def artifacts(self, run_dir: Path) -> list[Path]:
        """Files written after the test pass from what it kept: plots, tables. None by default."""
        return []

    # -- what all apps share ---------------------------------------------------------------------------------------

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """One forward pass; sums of loss and extras wait on the device until the epoch ends."""
        loss, extras = self.loss(batch)
        value = loss.detach()
        self.loss_sum = value.clone() if self.loss_sum is None else self.loss_sum.add_(value)
        for name, extra in extras.items():
            extra = extra.detach()
            self.extra_sums[name] = self.extra_sums[name].add_(extra) if name in self.extra_sums else extra.clone()
            self.extra_counts[name] = self.extra_counts.get(name, 0) + 1
        self.batches += 1
        self._last_loss = value
        if not value.is_cuda:
            self._judge(value, None, batch_idx, self.global_step)
        return loss

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Clip by the norm of all gradients; the norm also tells whether the numbers are still numbers."""
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        batch_idx, step = self.trainer.fit_loop.batch_idx, self.global_step
        if norm.is_cuda:
            # The values of the step before are ready by now: reading them does not make the GPU wait for us.
            self.check_finite()
            self._unread = (self._last_loss, norm, batch_idx, step)
        else:
            self._judge(self._last_loss, norm, batch_idx, step)
        if self.recipe.optim.clip_norm:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.recipe.optim.clip_norm, norm)

    def check_finite(self) -> None:
        """Read loss and gradient norm that a GPU has not been asked for yet; called before anything is saved.

        Raises:
            RunFailed: one of them is NaN or infinite.
        """
        unread, self._unread = self._unread, None
        if unread is not None:
            self._judge(*unread)

    def _judge(self, loss: Tensor, norm: Tensor | None, batch_idx: int, step: int) -> None:
        """Stop the run unless loss and gradient norm (None: not known yet) are finite numbers."""
        if norm is not None and math.isfinite(norm):
            self._last_norm = float(norm)
        broken_gradient = norm is not None and not math.isfinite(norm)
        if broken_gradient and math.isfinite(loss):
            # In fp16 the loss is scaled up until gradients overflow now and then; that step is skipped and the scale
            # halved. Only a scale that has nowhere left to go means that the numbers themselves are broken.
            scaler = getattr(self.trainer.precision_plugin, "scaler", None)
            broken_gradient = scaler is None or scaler.get_scale() < 1
        if math.isfinite(loss) and not broken_gradient:
            return
        what = "gradient" if math.isfinite(loss) else "loss"
        said = f"{float(norm):.4g}" if norm is not None else f"of the step before {self._last_norm:.4g}"
        raise RunFailed(
            f"the {what} is not a finite number at batch {batch_idx} of epoch {self.current_epoch} (step {step}): "
            f"loss {float(loss):.4g}, gradient norm {said}; "
            "try a lower optim.lr, a smaller optim.clip_norm or trainer.precision=32-true",
            status="nan",
        )

    def configure_optimizers(self) -> Any:
        """AdamW in two groups with a schedule per step."""
        # With a gradient scaler the fused kernel would unscale inside itself, after the norm was taken.
        fused = self.recipe.trainer.precision != "16-mixed"
        optimizer = build_optimizer(self, self.recipe.optim, fused=fused)
        scheduler = build_scheduler(optimizer, self.recipe.optim, self.total_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then take the new weights into their running mean."""
        super().optimizer_step(*args, **kwargs)
        if self.average is not None:
            self.average.update()

    def read_sums(self) -> dict[str, float]:
        """Mean training loss, and each extra's mean over the batches that reported it, since the last call."""
        means = {name: float(total) / self.extra_counts[name] for name, total in self.extra_sums.items()}
        loss = float(self.loss_sum) / self.batches if self.loss_sum is not None else math.nan
        self.loss_sum, self.extra_sums, self.extra_counts, self.batches = None, {}, {}, 0
        return {"loss": loss, **means}

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode, averaged weights if the recipe has them, no gradients; all as before afterwards."""
        modes = {module: module.training for module in self.modules()}
        self.eval()
        with self.average.applied() if self.average is not None else nullcontext(), torch.no_grad():
            try:
                yield
            finally:
                for module, training in modes.items():
                    module.training = training
