"""Dates of many kinds, the step between rows, and the dates that come next."""

import pandas as pd
import pytest

from apps.timeseries.clock import Clock, find_time, infer_frequency, nearest, positions, read_stamps
from core.training.errors import UserError


@pytest.mark.parametrize(
    ("cells", "first", "last"),
    [
        (["1949-01", "1949-02", "1949-03"], "1949-01-01", "1949-03-01"),
        (["1/1/1981", "1/2/1981", "1/13/1981"], "1981-01-01", "1981-01-13"),
        (["04/30/2021", "04/23/2021", "02/8/1991"], "2021-04-30", "1991-02-08"),
        (["13/01/2020", "14/01/2020", "15/01/2020"], "2020-01-13", "2020-01-15"),
        # Neither order is impossible here; only day first keeps the steps even.
        (["10/02/2020", "11/02/2020", "12/02/2020"], "2020-02-10", "2020-02-12"),
        (["1990/1/1 0:00", "1990/1/2 0:00"], "1990-01-01", "1990-01-02"),
        (["1956-01-01", "1956-04-01", "1956-07-01"], "1956-01-01", "1956-07-01"),
        (["2024-03-31", "2024-03-31 01:00:00"], "2024-03-31", "2024-03-31 01:00"),
        (["2024-03-30T23:00:00+01:00", "2024-03-31T04:00:00+02:00"], "2024-03-30 22:00", "2024-03-31 02:00"),
    ],
)
def test_dates_are_read_as_people_write_them(cells, first, last):
    stamps = read_stamps(pd.Series(cells), "date")
    assert (stamps[0], stamps[-1]) == (pd.Timestamp(first), pd.Timestamp(last))


@pytest.mark.parametrize(
    ("numbers", "name", "first"),
    [
        ([1980, 1981, 1982], "year", "1980-01-01"),
        ([1467331200, 1467334800], "timestamp", "2016-07-01 00:00"),
        ([1467331200000, 1467334800000], "time", "2016-07-01 00:00"),
        ([20160701, 20160702], "date", "2016-07-01"),
    ],
)
def test_numbers_that_are_dates(numbers, name, first):
    assert read_stamps(pd.Series(numbers), name)[0] == pd.Timestamp(first)


def test_an_unreadable_date_is_named():
    with pytest.raises(UserError, match=r"time column 'when': row 3, 'soon' is not a date"):
        read_stamps(pd.Series(["2020-01-01", "2020-01-02", "soon"]), "when")
    with pytest.raises(UserError, match="row 2 is empty"):
        read_stamps(pd.Series(["2020-01-01", None]), "when")


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        ({"y": [1.0, 2.0], "date": ["2020-01-01", "2020-01-02"]}, "date"),
        ({"Zeit": ["2020-01-01", "2020-01-02"], "y": [1.0, 2.0]}, "Zeit"),
        ({"index": [3, 4], "y": [1.0, 2.0]}, "index"),
        ({"Unnamed: 0": [0, 1], "y": [1.0, 2.0]}, "Unnamed: 0"),
        # A calendar feature that comes round again is not the time.
        ({"month": [1, 2, 1, 2], "y": [1.0, 2.0, 3.0, 4.0]}, None),
        ({"a": [1.0, 2.0], "city": ["x", "y"]}, None),
    ],
)
def test_the_time_column_is_found(columns, found):
    assert find_time(pd.DataFrame(columns), None)[0] == found


def test_a_wrong_time_column_gets_the_nearest_spelling():
    with pytest.raises(UserError, match=r"no time column 'dat' \(did you mean 'Date'\?\); columns: Date, y"):
        find_time(pd.DataFrame({"Date": ["2020-01-01"], "y": [1.0]}), "dat")


@pytest.mark.parametrize(
    ("first", "frequency", "season"),
    [
        ("2024-01-01", "h", 24),
        ("2024-01-01", "15min", 96),
        ("2024-01-01", "30min", 48),
        ("2024-01-01", "D", 7),
        ("2024-01-01", "B", 5),
        ("2024-01-01", "7D", 52),
        ("2024-01-01", "MS", 12),
        ("2024-01-31", "ME", 12),
        ("2024-01-01", "3MS", 4),
        ("2024-01-01", "12MS", None),
        ("2024-01-01", "s", 3600),
    ],
)
def test_frequency_and_season(first, frequency, season):
    stamps = pd.date_range(first, periods=30, freq=frequency)
    clock = Clock("date", "date", infer_frequency(stamps))
    assert clock.frequency == frequency
    assert clock.season == season
    # The dates go on as the table would have.
    expected = pd.date_range(first, periods=34, freq=frequency)[30:]
    assert list(clock.after(stamps[-1], 4)) == list(expected)


def test_the_fifteenth_of_each_month_goes_on():
    stamps = pd.DatetimeIndex([f"2024-{month:02d}-15" for month in range(1, 10)])
    clock = Clock("date", "date", infer_frequency(stamps))
    assert (clock.frequency, clock.season) == ("1 months", 12)
    assert clock.after(stamps[-1], 2)[-1] == pd.Timestamp("2024-11-15")


def test_an_index_goes_on():
    assert list(Clock("row").after(143, 3)) == [144, 145, 146]
    assert list(Clock("number", "t", infer_frequency(pd.Index([10, 15, 20]))).after(20, 2)) == [25, 30]
    assert list(Clock("number", "t", infer_frequency(pd.Index([0.0, 0.5, 1.0]))).after(1.0, 2)) == [1.5, 2.0]


def test_gaps_keep_their_place_on_the_grid():
    stamps = pd.DatetimeIndex(["2024-01-01", "2024-01-02", "2024-01-05"])
    at, grid = positions(stamps, Clock("date", "date", "D"))
    assert (list(at), len(grid)) == ([0, 1, 4], 5)
    at, grid = positions(pd.Index([1, 2, 5]), Clock("number", "t", "1"))
    assert (list(at), list(grid)) == ([0, 1, 4], [1, 2, 3, 4, 5])


def test_dates_between_the_steps_are_an_error():
    stamps = pd.DatetimeIndex(["2024-01-01 00:00", "2024-01-01 01:00", "2024-01-01 02:00", "2024-01-01 02:20"])
    with pytest.raises(UserError, match=r"steps are mostly h, but 1 of 4 rows lie between.*2024-01-01 02:20"):
        positions(stamps, Clock("date", "date", "h"))


def test_an_unknown_frequency_is_an_error():
    with pytest.raises(UserError, match=r"data.frequency='hourly' is not a frequency"):
        Clock("date", "date", "hourly").after("2024-01-01", 1)


def test_nearest_does_not_mind_the_case():
    assert nearest("ot", ["HUFL", "OT"]) == " (did you mean 'OT'?)"
    assert nearest("xyz", ["HUFL", "OT"]) == ""


@pytest.mark.parametrize(
    ("file", "rows", "frequency", "season"),
    [
        ("AirPassengers", 144, "MS", 12),
        ("ausbeer", 211, "3MS", 4),
        ("heart_rate", 1800, None, None),
        ("ice_cream_heater", 198, "MS", 12),
        ("monthly-sunspots", 2820, "MS", 12),
        ("taxi_new_york_passengers", 10320, "30min", 48),
        ("temps", 3650, "D", 7),
        ("us_gasoline", 1578, "7D", 52),
        ("wineind", 176, "MS", 12),
        ("woolyrnq", 119, "3MS", 4),
    ],
)
def test_public_files_tell_their_frequency(shared_data, file, rows, frequency, season):
    frame = pd.read_csv(shared_data / "timeseries" / "darts_small" / f"{file}.csv")
    column, stamps = find_time(frame, None)
    assert len(stamps) == rows
    if frequency is None:
        assert column is None
    else:
        clock = Clock("date", column, infer_frequency(stamps.sort_values()))
        assert (clock.frequency, clock.season) == (frequency, season)
