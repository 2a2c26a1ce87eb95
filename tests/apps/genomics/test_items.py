"""Stretches: each token is scored once, with the context that was asked for; batches are padded at the end."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apps.genomics.items import Items, Stretch, cut, padded


@given(
    length=st.integers(1, 300),
    size=st.integers(4, 64),
    overlap=st.integers(0, 40),
    causal=st.booleans(),
)
def test_overlapping_stretches_score_every_token_once(length, size, overlap, causal):
    overlap = min(overlap, size - 1)
    pieces = cut(length, size, None, overlap, causal)
    scored = np.zeros(length, dtype=int)
    for start, stop, first, last in pieces:
        assert 0 <= start <= first < last <= stop <= length
        assert stop - start == min(size, length)
        scored[first:last] += 1
    assert (scored == 1).all()
    for start, stop, first, last in pieces:
        if causal:
            assert first == 0 or first - start >= overlap
        else:
            assert first == 0 or first - start >= overlap // 2
            assert last == length or stop - last >= overlap // 2


@given(length=st.integers(1, 200), size=st.integers(4, 50), stride=st.integers(1, 60))
def test_training_stretches_are_scored_wholly_and_reach_the_end(length, size, stride):
    pieces = cut(length, size, stride)
    assert all((first, last) == (start, stop) for start, stop, first, last in pieces)
    assert pieces[-1][1] == length
    if stride <= size:
        assert len(set().union(*(range(start, stop) for start, stop, _, _ in pieces))) == length


def test_a_whole_sequence_is_one_stretch_at_the_limit_and_two_beyond():
    assert len(cut(63, 64)) == len(cut(64, 64)) == 1
    assert len(cut(65, 64)) == 2


def test_a_batch_pads_at_the_end_and_scores_no_padding():
    items = Items(
        "val",
        [np.array([1, 2, 3], dtype=np.uint8), np.array([3, 2, 1, 0, 2], dtype=np.uint8)],
        [Stretch(0, 0, 3, 0, 3), Stretch(1, 1, 5, 2, 4)],
        targets=[np.array([7, 8, 9], dtype=np.int16), np.arange(5, dtype=np.int16)],
        scored=[np.array([True, False, True]), None],
        per_token=True,
    )
    batch = items.__getitems__([0, 1])
    assert batch["ids"].tolist() == [[1, 2, 3, 0], [2, 1, 0, 2]]
    assert batch["mask"].tolist() == [[True] * 3 + [False], [True] * 4]
    assert batch["scored"].tolist() == [[True, False, True, False], [False, True, True, False]]
    assert batch["target"].tolist() == [[7, 8, 9, -1], [-1, 2, 3, -1]]
    assert (batch["part"], batch["index"].tolist(), items.lengths) == ("val", [0, 1], [3, 4])


def test_targets_of_whole_sequences():
    sequences, stretches = [np.zeros(2, dtype=np.uint8)] * 2, [Stretch(n, 0, 2, 0, 2) for n in range(2)]
    assert Items("test", sequences, stretches, targets=[1, 0]).__getitems__([1, 0])["target"].tolist() == [0, 1]
    pair = [np.array([1.5, 2.5], dtype=np.float32)] * 2  # as many targets as letters, and yet one per sequence
    assert Items("test", sequences, stretches, targets=pair).__getitems__([0])["target"].tolist() == [[1.5, 2.5]]


def test_padding_of_sequences():
    ids, mask = padded([np.array([5], dtype=np.uint8), np.array([1, 2], dtype=np.uint8)])
    assert ids.tolist() == [[5, 0], [1, 2]]
    assert mask.tolist() == [[True, False], [True, True]]
    assert ids.dtype.is_signed
    with pytest.raises(ValueError, match=r"empty|max"):
        padded([])
