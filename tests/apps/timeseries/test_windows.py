"""Windows: where they begin and end, what a batch holds, and that the future never reaches the past."""

import numpy as np
import pytest
import torch

from apps.timeseries.windows import Scaler, Windows, fill_forward


def counting(rows: int = 50, series: int = 3) -> torch.Tensor:
    """[C, T] with the value 1000 * series + row, so that every number tells where it comes from."""
    return torch.arange(rows, dtype=torch.float32) + 1000 * torch.arange(series)[:, None]


def test_every_origin_of_a_part_once():
    train = Windows(counting(), 0, 30, lookback=7, horizon=3)
    val = Windows(counting(), 30, 40, lookback=7, horizon=3)
    assert train.origins.tolist() == list(range(7, 28))
    assert val.origins.tolist() == list(range(30, 38)), "the look-back of the first validation window lies in training"
    assert Windows(counting(), 0, 30, 7, 3, stride=5).origins.tolist() == [7, 12, 17, 22, 27]
    assert len(Windows(counting(), 30, 40, 7, 10)) == 1
    assert len(Windows(counting(), 30, 40, 7, 11)) == 0


def test_a_batch_is_what_its_rows_say():
    windows = Windows(counting(), 30, 40, lookback=7, horizon=3, part="val")
    batch = windows.__getitems__([0, 5])
    assert batch["origin"].tolist() == [30, 35]
    assert batch["part"] == "val"
    assert batch["past"][1, 2].tolist() == [2028 + step for step in range(7)]
    assert batch["future"][1, 2].tolist() == [2035, 2036, 2037]
    item = windows[5]
    assert torch.equal(item["past"], batch["past"][1])
    assert torch.equal(item["future"], batch["future"][1])


def test_a_batch_costs_its_own_size_whatever_the_table():
    # A copy per window would be 4 bytes x lookback x number of windows: 8 GB here.
    windows = Windows(torch.zeros(1, 4_000_000), 0, 4_000_000, lookback=500, horizon=10)
    batch = windows.__getitems__([0, 1_000_000, 3_999_490])
    assert batch["past"].untyped_storage().nbytes() == 3 * 510 * 4


def test_windows_without_an_observed_future_are_left_out():
    observed = torch.ones(2, 30, dtype=torch.bool)
    observed[:, 12:18] = False
    observed[0, 15] = True
    windows = Windows(counting(30, 2), 0, 30, 5, 2, observed=observed)
    # Origins 12, 16 see nothing in [o, o + 2); 13, 17 neither; 14 and 15 hold row 15 of series 0.
    assert [o for o in range(5, 29) if o not in windows.origins.tolist()] == [12, 13, 16]
    batch = windows.__getitems__([windows.origins.tolist().index(14)])
    assert batch["observed"].tolist() == [[[False, True], [False, False]]]


def test_scaler_is_of_the_training_rows_and_goes_back():
    values = np.array([[1.0, 5.0], [3.0, 5.0], [100.0, 6.0]])
    scaler = Scaler.fit(values[:2])
    assert scaler.mean.tolist() == [2, 5]
    assert scaler.std.tolist() == [1, 1], "ddof 0; a constant series is divided by 1"
    assert scaler.standardise(values).tolist() == [[-1, 0], [1, 0], [98, 1]]
    np.testing.assert_allclose(scaler.restore(scaler.standardise(values)), values)


def test_filling_uses_the_past_only():
    nan = np.nan
    filled = fill_forward(np.array([[nan, 1.0], [2.0, nan], [nan, nan], [4.0, 5.0], [nan, nan]]))
    assert filled.tolist() == [[2, 1], [2, 1], [2, 1], [4, 5], [4, 5]]


@pytest.mark.parametrize("change", [29, 40, 49])
def test_a_later_row_changes_no_earlier_batch(change):
    table, changed = counting(), counting()
    changed[:, change] += 7
    old, new = (Windows(t, 0, 30, 7, 3).__getitems__(range(21)) for t in (table, changed))
    before = old["origin"] + 3 <= change
    assert torch.equal(old["past"], new["past"]), "no training look-back reaches the last training row"
    assert torch.equal(old["future"][before], new["future"][before])
    assert torch.equal(old["future"], new["future"]) == (change >= 30)
