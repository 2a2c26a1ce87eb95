"""What an app's data looks like to training, and the order in which training reads it.

The order is a pure function of (seed, epoch): every attention variant sees the same batches, and a run that was
killed in the middle of an epoch continues with exactly the batch that it would have seen next.
"""

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, Subset, default_collate

from core.training.errors import UserError


@dataclass
class Data:
    """What `build_data` returns.

    Attributes:
        train: map-style dataset. A dataset may offer `__getitems__(list[int])` that returns a whole batch, which
            is much faster than item by item and needs no collate.
        val: the part that picks the best epoch; None: the last epoch counts.
        test: the part that is reported; None: nothing is.
        spec: plain JSON types only; all that the model and `predict` need (scaler, channels, vocabulary). It is stored
            in the checkpoint.
        summary: plain JSON types only, printed and stored: items used and dropped per part and why, split rule, units.
        collate: what `__getitems__` returns, or else a list of items -> batch; None: whole batches are taken as they
            are, items go through `torch.utils.data.default_collate`.
        lengths: of the training items, in any unit; batches then hold items of similar length, so that little of them
            is padding. None: batches are drawn regardless.
    """

    train: Dataset
    val: Dataset | None = None
    test: Dataset | None = None
    spec: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    collate: Callable[[list[Any]], Any] | None = None
    lengths: Sequence[int] | None = None


POOL = 50
"""Batches that are sorted by length together: enough to save the padding, few enough to keep the order random."""


class EpochOrder(Sampler[list[int]]):
    """Batches of indices in an order that depends on (seed, epoch) and nothing else.

    Args:
        length: number of items.
        batch_size: items per batch and rank; the last batch may be smaller, no item is dropped.
        seed: of the run.
        shuffle: False keeps 0, 1, 2, ...
        rank, world: with several processes each takes every `world`-th item; items from the front fill the last
            round up, so that all take the same number of steps.
        lengths: of the items; `POOL` batches at a time are sorted by them, cut anew, and shuffled as batches.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int = 0,
        *,
        shuffle: bool = True,
        rank: int = 0,
        world: int = 1,
        lengths: Sequence[int] | None = None,
    ):
        if lengths is not None and len(lengths) != length:
            raise ValueError(f"lengths must have one entry per item: {length} items, {len(lengths)} lengths")
        self.length, self.batch_size, self.seed, self.shuffle = length, batch_size, seed, shuffle
        self.lengths = None if lengths is None else torch.as_tensor(lengths)
        self.rank, self.world = rank, world
        self.epoch = 0
        self.start = 0  # the batch with which the next iteration begins

    def __len__(self) -> int:
        """Batches of a whole epoch, also when the next iteration begins in its middle."""
        return -(-self.items // self.batch_size)

    @property
    def items(self) -> int:
        """Items that this rank reads in an epoch."""
        return -(-self.length // self.world)

    def seek(self, epoch: int, batch: int = 0) -> None:
        """Go to a position; batch `len(self)` is the start of the next epoch."""
        self.epoch, self.start = (epoch + 1, 0) if batch >= len(self) else (epoch, batch)

    def indices(self) -> torch.Tensor:
        """This rank's items in the order of the current epoch, [items] int64."""
        if self.shuffle:
            generator = torch.Generator().manual_seed(mix(self.seed, self.epoch))
            order = torch.randperm(self.length, generator=generator)
        else:
            order = torch.arange(self.length)
        return order[torch.arange(self.rank, self.items * self.world, self.world) % self.length]

    def __iter__(self) -> Iterator[list[int]]:
        batches, start, self.start = self.batches(), self.start, 0
        for batch in batches[start:]:
            yield batch.tolist()

    def batches(self) -> list[torch.Tensor]:
        """This rank's batches of the current epoch."""
        order = self.indices()
        if self.lengths is None or not self.shuffle:
            return list(order.split(self.batch_size))
        pools = order.split(POOL * self.batch_size)
        # Stable: items of equal length stay in the random order that they were drawn in.
        alike = [pool[self.lengths[pool].argsort(stable=True)] for pool in pools]
        batches = [batch for pool in alike for batch in pool.split(self.batch_size)]
        generator = torch.Generator().manual_seed(mix(self.seed, self.epoch, 2))
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def padding_share(lengths: Sequence[int], batches: Iterable[Sequence[int]]) -> float:
    """Share of padding, 0 to 1, where each batch of indices is padded to its longest item."""
    found = [[lengths[index] for index in batch] for batch in batches]
    padded = sum(max(batch) * len(batch) for batch in found)
    return 1 - sum(map(sum, found)) / padded if padded else 0.0


def mix(*parts: int) -> int:
    """A seed from several numbers, so that (seed 0, epoch 1) and (seed 1, epoch 0) have nothing in common."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


class Loader(DataLoader):
    """A DataLoader that knows where it is, so that a checkpoint can say which batch comes next.

    The generator is its own: drawing the workers' seeds from torch's would change the dropout masks of a resumed run.
    """

    def __init__(self, dataset: Dataset, order: EpochOrder, *, collate: Callable | None = None, workers: int = 0):
        if collate is None:
            # torch's own Subset has a `__getitems__` too, but it returns a list of items.
            whole = hasattr(dataset, "__getitems__") and not isinstance(dataset, Subset)
            collate = whole_batch if whole else default_collate
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        if workers > max(16, 4 * cores):  # each is a process with all of torch in it
            raise UserError(
                f"trainer.workers={workers} is too many for {cores} cores: at most {max(16, 4 * cores)} here"
            )
        generator = torch.Generator()
        super().__init__(dataset, batch_sampler=order, collate_fn=collate, num_workers=workers, generator=generator)
        self.order = order
        self._epoch = self._batch = 0

    def __iter__(self) -> Iterator[Any]:
        self._epoch, self._batch = self.order.epoch, self.order.start
        assert isinstance(self.generator, torch.Generator)
        self.generator.manual_seed(mix(self.order.seed, self.order.epoch, 1))
        return self._counted(super().__iter__())

    def _counted(self, batches: Iterator[Any]) -> Iterator[Any]:
        # Counts what was handed out, not what the workers have fetched ahead.
        try:
            for batch in batches:
                self._batch += 1
                yield batch
        except UserError as error:
            # torch brings an error home from a worker under the worker's traceback; the user's line is the last one.
            line = str(error).strip().splitlines()[-1]
            raise UserError(line.removeprefix(f"{UserError.__module__}.UserError: ")) from error

    def state_dict(self) -> dict[str, int]:
        """Epoch, and batches of it that were handed out."""
        return {"epoch": self._epoch, "batch": self._batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after the last batch that was handed out."""
        self.order.seek(state["epoch"], state["batch"])


def check_unchanged(before: dict[str, Any], now: dict[str, Any], folder: Any) -> None:
    """Refuse to go on with data that is not what the run in `folder` has learned from.

    Args:
        before, now: `Data.spec` of the checkpoint and of the data as it is today. Keys that only one of them has belong
            to another version of the app and are left alone; of packed matrices (see `matrices`), which are fitted to
            the data, the last bits depend on the machine, so only their shapes count.

    Raises:
        UserError: they differ; the first place is named.
    """
    for key in before.keys() & now.keys():
        place = _difference(before[key], now[key], key)
        if place is not None:
            raise UserError(
                f"{folder} was trained on other data: {place}; bring it back, or train in another --run-dir"
            )


def _difference(a: Any, b: Any, at: str) -> str | None:
    """Where two plain values differ first, and how."""
    if isinstance(a, dict) and isinstance(b, dict):
        if "float32" in a and "float32" in b:
            return _difference(a.get("shape"), b.get("shape"), f"{at}.shape")
        for key in [*a, *(key for key in b if key not in a)]:
            found = _difference(a.get(key), b.get(key), f"{at}.{key}")
            if found is not None:
                return found
        return None
    if isinstance(a, list) and isinstance(b, list):
        if len(a) != len(b):
            return f"{at} had {len(a)} entries, now {len(b)}"
        return next((found for i, (x, y) in enumerate(zip(a, b)) if (found := _difference(x, y, f"{at}.{i}"))), None)
    if isinstance(a, float) and isinstance(b, float) and math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-12):
        return None  # sums over the data in another order
    return None if a == b else f"{at} was {_short(a)}, now it is {_short(b)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def whole_batch(batch: Any) -> Any:
    """The collate of datasets that return whole batches (a function, not a lambda: workers pickle it)."""
    return batch


def size(dataset: Dataset, part: str) -> int:
    """Number of items; an empty part is the user's error, not a division by zero later."""
    length = len(dataset)  # type: ignore[arg-type]
    if length == 0:
        raise UserError(f"the {part} part of the data has no items")
    return length


def train_loader(data: Data, *, batch_size: int, seed: int, workers: int = 0, rank: int = 0, world: int = 1) -> Loader:
    """The training part in its (seed, epoch) order."""
    order = EpochOrder(size(data.train, "train"), batch_size, seed, rank=rank, world=world, lengths=data.lengths)
    return Loader(data.train, order, collate=data.collate, workers=workers)


def eval_loader(data: Data, part: str, *, batch_size: int, workers: int = 0) -> Loader:
    """The `val` or `test` part from first to last, nothing dropped."""
    dataset = getattr(data, part)
    return Loader(
        dataset, EpochOrder(size(dataset, part), batch_size, shuffle=False), collate=data.collate, workers=workers
    )
