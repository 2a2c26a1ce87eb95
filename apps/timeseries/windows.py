"""Windows over a table: every forecast origin of a part is an item, and a batch is cut from one tensor at once."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.utils.data import Dataset


class Scaler:
    """Mean and standard deviation per series, from the training part alone.

    Args:
        mean, std: [C], in the units of the file.
    """

    def __init__(self, mean: ArrayLike, std: ArrayLike):
        self.mean, self.std = np.asarray(mean, dtype=np.float64), np.asarray(std, dtype=np.float64)

    @classmethod
    def fit(cls, values: np.ndarray) -> "Scaler":
        """From values [T, C]; NaN are passed over (ddof 0, as published); a constant series keeps deviation 1."""
        std = np.nanstd(values, axis=0)
        return cls(np.nanmean(values, axis=0), np.where(std > 0, std, 1.0))

    def standardise(self, values: np.ndarray) -> np.ndarray:
        """[..., C] in the units of the file -> in training standard deviations."""
        return (values - self.mean) / self.std

    def restore(self, values: np.ndarray) -> np.ndarray:
        """[..., C] in training standard deviations -> in the units of the file."""
        return values * self.std + self.mean


class Windows(Dataset):
    """All forecast origins between two rows.

    An item is the window around an origin o: `past` holds the rows [o - lookback, o), `future` [o, o + horizon). The
    past may lie in the part before; the future never leaves its own.

    Args:
        values: [C, T] standardised float32, without NaN; shared by all parts, never copied as a whole.
        first, last: futures lie in the rows [first, last).
        lookback, horizon: steps.
        part: "train", "val" or "test"; every batch carries it.
        stride: take every n-th origin.
        observed: [C, T] bool, False where `values` was filled in; None: everything was seen.
        best: gives the best possible forecast [H, C] after an origin, standardised; None for real data.
    """

    def __init__(
        self,
        values: Tensor,
        first: int,
        last: int,
        lookback: int,
        horizon: int,
        *,
        part: str = "train",
        stride: int = 1,
        observed: Tensor | None = None,
        best: Callable[[int], np.ndarray] | None = None,
    ):
        self.values, self.observed, self.best = values, observed, best
        self.lookback, self.horizon, self.part = lookback, horizon, part
        origins = torch.arange(max(first, lookback), last - horizon + 1, stride)
        if observed is not None and len(origins):
            seen = observed.any(dim=0).unfold(0, horizon, 1).any(dim=-1)
            origins = origins[seen[origins]]
        self.origins = origins

    def __len__(self) -> int:
        return len(self.origins)

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Any]:
        """A batch: past [B, C, lookback], future and (if masked) observed [B, C, horizon], origin [B], part."""
        origins = self.origins[torch.as_tensor(indices, dtype=torch.int64)]
        length = self.lookback + self.horizon
        both = self.values.unfold(-1, length, 1)[:, origins - self.lookback].transpose(0, 1)
        batch = {"past": both[..., : self.lookback], "future": both[..., self.lookback :]}
        batch |= {"origin": origins, "part": self.part}
        if self.observed is not None:
            batch["observed"] = self._futures(self.observed, origins)
        return batch

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One item, without the batch axis."""
        batch = self.__getitems__([index])
        return {key: value[0] if isinstance(value, Tensor) else value for key, value in batch.items()}

    def _futures(self, rows: Tensor, origins: Tensor) -> Tensor:
        return rows.unfold(-1, self.horizon, 1)[:, origins].transpose(0, 1)


def fill_forward(values: np.ndarray) -> np.ndarray:
    """[T, C] with every NaN replaced by the last value before it (before the first value: by the first value).

    Never by a later value inside the series: that would show the past a piece of its future.
    """
    known = ~np.isnan(values)
    last = np.maximum.accumulate(np.where(known, np.arange(len(values))[:, None], -1), axis=0)
    first = known.argmax(axis=0)
    return np.take_along_axis(values, np.where(last < 0, first, last), axis=0)
