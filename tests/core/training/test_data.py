"""The order of the data: a pure function of seed and epoch, complete, resumable at any batch."""

from itertools import chain, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import Dataset, Subset, TensorDataset

from core.training.data import Data, EpochOrder, Loader, eval_loader, mix, padding_share, train_loader
from core.training.errors import UserError

sizes = st.integers(1, 70)


@given(length=sizes, batch=st.integers(1, 20), seed=st.integers(0, 5), epoch=st.integers(0, 5))
def test_every_item_once_in_an_order_that_depends_on_seed_and_epoch_only(length, batch, seed, epoch):
    order = EpochOrder(length, batch, seed)
    order.seek(epoch)
    batches = list(order)
    assert len(batches) == len(order)
    assert sorted(chain.from_iterable(batches)) == list(range(length))
    other = EpochOrder(length, batch, seed)
    list(other)  # that another epoch was read before changes nothing
    other.seek(epoch)
    assert list(other) == batches
    one = EpochOrder(length, 1, seed)
    one.seek(epoch)
    assert [index for [index] in one] == list(chain.from_iterable(batches)), "the batch size must not change the order"


@given(length=sizes, batch=st.integers(1, 20), data=st.data())
def test_it_continues_at_any_batch(length, batch, data):
    order = EpochOrder(length, batch, seed=3)
    order.seek(4)
    whole = list(order)
    start = data.draw(st.integers(0, len(whole)))
    order.seek(4, start)
    assert len(order) == len(whole)
    if start < len(whole):
        assert list(order) == whole[start:]
        assert list(order) == whole, "only the first pass begins in the middle"
    else:
        assert (order.epoch, order.start) == (5, 0)


@given(length=sizes, batch=st.integers(1, 9), world=st.integers(1, 5))
def test_ranks_share_an_epoch_in_equal_numbers_of_batches(length, batch, world):
    ranks = [EpochOrder(length, batch, 1, rank=rank, world=world) for rank in range(world)]
    batches = [list(order) for order in ranks]
    assert len({tuple(map(len, each)) for each in batches}) == 1
    read = list(chain.from_iterable(chain.from_iterable(batches)))
    assert set(read) == set(range(length))
    assert len(read) - length < world, "only what fills the last round up"


@given(lengths=st.lists(st.integers(1, 500), min_size=1, max_size=80), batch=st.integers(1, 9), seed=st.integers(0, 3))
def test_buckets_hold_every_item_once_and_are_resumable(lengths, batch, seed):
    order = EpochOrder(len(lengths), batch, seed, lengths=lengths)
    order.seek(2)
    batches = list(order)
    assert len(batches) == len(order)
    assert sorted(chain.from_iterable(batches)) == list(range(len(lengths)))
    order.seek(2, len(batches) // 2)
    assert list(order) == batches[len(batches) // 2 :]


def test_buckets_save_padding_but_keep_the_order_random():
    lengths = torch.randint(1, 1000, (3000,), generator=torch.Generator().manual_seed(0)).tolist()
    plain = padding_share(lengths, EpochOrder(3000, 16, 0))
    order = EpochOrder(3000, 16, 0, lengths=lengths)
    assert plain > 0.4
    assert padding_share(lengths, order) < 0.05
    order.seek(0)
    longest = [max(lengths[i] for i in batch) for batch in order]
    rises = sum(a < b for a, b in pairwise(longest))
    assert 0.35 < rises / len(longest) < 0.65, "batches must not come sorted"
    first = list(order)
    order.seek(1)
    assert list(order) != first, "another epoch has another order"


def test_lengths_count_the_items():
    with pytest.raises(ValueError, match="3 items, 2 lengths"):
        EpochOrder(3, 1, lengths=[1, 2])
    assert padding_share([3, 1, 2], [[0, 1], [2]]) == pytest.approx(2 / 8)
    assert padding_share([], []) == 0


def test_seeds_and_epochs_do_not_meet():
    seeds = {mix(seed, epoch) for seed in range(30) for epoch in range(30)}
    assert len(seeds) == 900
    first, second = EpochOrder(50, 50, 0), EpochOrder(50, 50, 1)
    assert list(first) != list(second)
    first.seek(1)
    assert list(first) != list(second)


def test_the_order_is_the_same_on_every_machine():
    assert list(EpochOrder(10, 10, 7)) == [[0, 2, 6, 8, 1, 4, 7, 5, 9, 3]]


class Whole(TensorDataset):
    def __getitems__(self, indices):
        return self.tensors[0][indices]


def test_whole_batches_items_and_collate():
    numbers = torch.arange(5.0)
    whole = list(eval_loader(Data(numbers, val=Whole(numbers)), "val", batch_size=2))
    assert [batch.tolist() for batch in whole] == [[0, 1], [2, 3], [4]]
    items = list(eval_loader(Data(numbers, val=Subset(TensorDataset(numbers), [3, 1])), "val", batch_size=2))
    assert [batch.tolist() for batch in items[0]] == [[3, 1]]
    own = list(eval_loader(Data(numbers, val=TensorDataset(numbers), collate=len), "val", batch_size=2))
    assert own == [2, 2, 1]


@pytest.mark.parametrize("workers", [0, 1])
def test_reading_draws_nothing_from_the_generators_of_training(workers):
    loader = Loader(Whole(torch.arange(20.0)), EpochOrder(20, 4), workers=workers)
    before = torch.get_rng_state()
    batches = iter(loader)
    next(batches)
    next(batches)
    assert torch.equal(torch.get_rng_state(), before)
    assert loader.state_dict() == {"epoch": 0, "batch": 2}, "batches fetched ahead by a worker do not count"
    rest = [batch.tolist() for batch in batches]
    loader.load_state_dict({"epoch": 0, "batch": 2})
    assert [batch.tolist() for batch in loader] == rest


def test_an_empty_part_is_the_users_mistake():
    empty = Data(Whole(torch.zeros(0)), val=Whole(torch.zeros(0)))
    with pytest.raises(UserError, match="the train part of the data has no items"):
        train_loader(empty, batch_size=2, seed=0)
    with pytest.raises(UserError, match="the val part of the data has no items"):
        eval_loader(empty, "val", batch_size=2)


class Broken(Dataset):
    """Its third item cannot be read."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        if index == 2:
            raise UserError("cannot read c.png: not an image")
        return index


@pytest.mark.parametrize("workers", [0, 1])
def test_a_mistake_that_a_worker_finds_is_one_line(workers):
    with pytest.raises(UserError) as error:
        list(Loader(Broken(), EpochOrder(4, 1), workers=workers))
    assert str(error.value) == "cannot read c.png: not an image"
