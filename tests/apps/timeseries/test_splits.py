"""Where the parts begin and end, to the row."""

import pandas as pd
import pytest

from apps.timeseries.recipe import DataSection
from apps.timeseries.splits import Borders, find_borders
from core.training.errors import UserError

HOURS = pd.date_range("2016-07-01", periods=17420, freq="h")


def test_the_ett_presets_are_months_of_thirty_days():
    assert find_borders(DataSection(split="ett_hour"), HOURS) == (8640, 11520, 14400)
    quarters = pd.date_range("2016-07-01", periods=69680, freq="15min")
    assert find_borders(DataSection(split="ett_minute"), quarters) == (34560, 46080, 57600)


def test_a_file_too_short_for_the_preset():
    with pytest.raises(UserError, match=r"data.split=ett_hour needs 14400 rows, the file has 100; use split=ratio"):
        find_borders(DataSection(split="ett_hour"), HOURS[:100])


@pytest.mark.parametrize("rows", [7588, 966, 52696, 144, 11])
def test_the_published_ratio(rows):
    # Time-Series-Library data_provider/data_loader.py, Dataset_Custom: train int(.7 N), test int(.2 N), val the rest.
    train, test = int(rows * 0.7), int(rows * 0.2)
    assert find_borders(DataSection(), pd.RangeIndex(rows)) == Borders(train, rows - test, rows)


def test_by_date():
    options = DataSection(split="dates", val_from="2017-06-26", test_from="2017-10-24")
    assert find_borders(options, HOURS) == (8640, 11520, 17420)
    between = DataSection(split="dates", val_from="2017-06-25 23:30", test_from="2017-10-24")
    assert find_borders(between, HOURS).train == 8640, "a date between two rows means the next row"


def test_by_row_where_there_are_no_dates():
    options = DataSection(split="dates", val_from="60", test_from="80")
    assert find_borders(options, pd.RangeIndex(100)) == (60, 80, 100)
    assert find_borders(options, pd.Index(range(50, 150))) == (10, 30, 100), "numbers are those of the index"


@pytest.mark.parametrize(
    ("val", "test", "message"),
    [
        (
            "2017-10-24",
            "2017-06-26",
            "must be in this order and inside the table, which runs from 2016-07-01 to 2018-06-26",
        ),
        ("2017-10-24", "2020-01-01", "inside the table"),
        ("soon", "2017-10-24", "data.val_from must be a date such as 2017-10-24, got 'soon'"),
    ],
)
def test_dates_that_cannot_be(val, test, message):
    with pytest.raises(UserError, match=message):
        find_borders(DataSection(split="dates", val_from=val, test_from=test), HOURS)
