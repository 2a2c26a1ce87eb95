"""Reading tables: what is accepted, what is refused in one line, and what the report says."""

import numpy as np
import pandas as pd
import pytest

from apps.timeseries.recipe import DataSection
from apps.timeseries.table import read_table
from core.training.errors import UserError


def days(count: int) -> list[str]:
    return [str(day.date()) for day in pd.date_range("2024-01-01", periods=count)]


def write(tmp_path, text: str, name: str = "my.csv"):
    path = tmp_path / name
    path.write_text(text)
    return path


def lines(*rows: str) -> str:
    return "date,a,OT\n" + "\n".join(rows) + "\n"


GOOD = [f"{day},{i},{10 * i}" for i, day in enumerate(days(12))]


def test_a_plain_table(tmp_path):
    table = read_table(write(tmp_path, lines(*GOOD)), DataSection())
    assert table.columns == ["a", "OT"]
    assert (table.values == np.stack([np.arange(12), 10 * np.arange(12)], axis=1)).all()
    assert (table.clock.kind, table.clock.column, table.clock.frequency) == ("date", "date", "D")
    assert table.report["gaps"] == "none"
    assert table.report["time"] == "column 'date', 2024-01-01 to 2024-01-12"


def test_targets_choose_columns_and_their_order(tmp_path):
    table = read_table(write(tmp_path, lines(*GOOD)), DataSection(targets=["OT", "a"]))
    assert table.columns == ["OT", "a"]
    assert table.values[3].tolist() == [30, 3]


def test_parquet_gives_what_csv_gives(tmp_path):
    frame = pd.DataFrame({"date": pd.to_datetime(days(12)), "a": np.arange(12.0)})
    frame.to_parquet(tmp_path / "plain.parquet")
    frame.set_index("date").to_parquet(tmp_path / "indexed.parquet")
    frame.to_csv(tmp_path / "same.csv", index=False)
    tables = [read_table(tmp_path / name, DataSection()) for name in ("plain.parquet", "indexed.parquet", "same.csv")]
    for table in tables:
        assert (table.columns, table.clock.frequency, table.stamps[-1]) == (["a"], "D", pd.Timestamp("2024-01-12"))
        assert (table.values[:, 0] == np.arange(12)).all()


def test_semicolons_and_decimal_commas(tmp_path):
    text = "Datum;Wert\n" + "".join(f"{i + 1:02d}.03.2024;{i},5\n" for i in range(20))
    table = read_table(write(tmp_path, text), DataSection())
    assert table.columns == ["Wert"]
    assert table.values[:3, 0].tolist() == [0.5, 1.5, 2.5]
    assert table.stamps[-1] == pd.Timestamp("2024-03-20")


def test_a_file_without_header_or_dates(tmp_path):
    table = read_table(write(tmp_path, "0.5,1.5\n0.6,1.6\n0.7,1.7\n"), DataSection())
    assert (table.columns, len(table.values), table.clock.kind) == (["series_0", "series_1"], 3, "row")


def test_columns_of_words_are_left_out_and_named(tmp_path):
    text = "date,city,a\n" + "".join(f"{day},Oslo,{i}\n" for i, day in enumerate(days(5)))
    table = read_table(write(tmp_path, text), DataSection())
    assert table.columns == ["a"]
    assert table.report["warnings"] == ["columns without numbers left out: city"]


BAD = {
    "text cell": (
        lines(*GOOD[:4], "2024-01-05,4,n.a.?", *GOOD[5:]),
        {},
        r"my.csv: row 5 \(line 6\), column 'OT': 'n.a.\?' is not a number",
    ),
    "missing target": (
        lines(*GOOD),
        {"targets": ["ot"]},
        r"target column 'ot' does not exist \(did you mean 'OT'\?\); columns: a, OT",
    ),
    "target is time": (lines(*GOOD), {"targets": ["date"]}, r"target column 'date' is the time column"),
    "missing time": (lines(*GOOD), {"time": "data"}, r"there is no time column 'data' \(did you mean 'date'\?\)"),
    "duplicate": (
        lines(*GOOD[:3], "2024-01-03,7,7", *GOOD[3:]),
        {},
        r"2024-01-03 is there twice \(rows 3 and 4\); data.timestamps=repair keeps the last",
    ),
    "unsorted": (
        lines(*GOOD[:3], GOOD[4], GOOD[3], *GOOD[5:]),
        {},
        r"not sorted: row 5 \(2024-01-04\) is older than row 4 \(2024-01-05\); data.timestamps=repair sorts it",
    ),
    "backwards": (lines(*GOOD[::-1]), {}, "runs from new to old; data.timestamps=repair turns it round"),
    "empty cell": (
        lines(*GOOD[:5], "2024-01-06,,50", *GOOD[6:]),
        {},
        r"column 'a' has 1 missing values \(first at 2024-01-06\), and data.missing=error; data.missing=mask .*fill",
    ),
    "gap": (lines(*GOOD[:3], *GOOD[5:]), {}, r"has 2 missing values \(first at 2024-01-04, 2 whole rows are absent\)"),
    "bad date": (lines(*GOOD[:5], "tomorrow,1,2"), {}, r"time column 'date': row 6, 'tomorrow' is not a date"),
    "twice": ("date,a,a\n2024-01-01,1,2\n", {}, r"column 'a' is there twice"),
    "no numbers": ("date,a\n2024-01-01,x\n2024-01-02,y\n", {}, r"no column of numbers; columns: date, a"),
    "no rows": ("date,a\n", {}, r"my.csv has no rows"),
    "empty": ("", {}, r"my.csv is empty \(0 bytes\)"),
    "infinite": (lines(*GOOD[:5], "2024-01-06,inf,50", *GOOD[6:]), {}, r"row 2024-01-06, column 'a' is infinite"),
    "long table": (
        "ds,id,y\n2024-01-01,A,1\n2024-01-01,B,2\n2024-01-02,A,1\n",
        {},
        r"there twice \(rows 1 and 2\).*if 'id' names the series, turn it into one column per series",
    ),
    "ragged": ("date,a\n2024-01-01,1\n2024-01-02,1,2,3\n", {}, r"is not a table: .*line 3"),
}


@pytest.mark.parametrize("case", BAD, ids=str)
def test_mistakes_are_one_line(tmp_path, case):
    text, options, message = BAD[case]
    with pytest.raises(UserError, match=message) as caught:
        read_table(write(tmp_path, text), DataSection(**options))
    assert "\n" not in str(caught.value)


def test_a_missing_file_gets_the_nearest_name(tmp_path):
    write(tmp_path, lines(*GOOD), "sales.csv")
    with pytest.raises(UserError, match=r"there is no file .*sale.csv \(did you mean 'sales.csv'\?\)"):
        read_table(tmp_path / "sale.csv", DataSection())
    with pytest.raises(UserError, match="is a folder"):
        read_table(tmp_path, DataSection())


@pytest.mark.parametrize("name", ["my.csv", "my.parquet"])
def test_a_file_of_another_kind(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" * 9)
    with pytest.raises(UserError, match=r"is not text|is not a readable Parquet file"):
        read_table(tmp_path / name, DataSection())


def test_repair_sorts_and_keeps_the_last_duplicate(tmp_path):
    text = lines(*GOOD[:3], "2024-01-03,70,7", GOOD[4], GOOD[3], *GOOD[5:])
    table = read_table(write(tmp_path, text), DataSection(timestamps="repair"))
    assert table.values[:, 0].tolist() == [0, 1, 70, *range(3, 12)]
    assert table.report["warnings"] == [
        "rows sorted by 'date': 2 of 13 moved",
        "1 rows with a repeated 'date' dropped, the last of each kept",
    ]


def test_as_is_keeps_every_row(tmp_path):
    text = lines(*GOOD[:3], "2024-01-03,70,7", *GOOD[5:])
    table = read_table(write(tmp_path, text), DataSection(timestamps="as_is", frequency="D"))
    assert len(table.values) == 11
    assert table.stamps[3] == pd.Timestamp("2024-01-03")


def test_gaps_become_missing_rows_and_are_reported(tmp_path):
    table = read_table(write(tmp_path, lines(*GOOD[:5], *GOOD[7:10], GOOD[11])), DataSection(missing="mask"))
    assert np.flatnonzero(np.isnan(table.values[:, 0])).tolist() == [5, 6, 10]
    assert table.report["gaps"] == "3 rows absent in 2 gaps, first at 2024-01-06, longest 2 rows"
    assert table.report["missing"] == {"a": 3, "OT": 3}


def test_sentinels_are_seen_and_read_as_missing_on_request(tmp_path):
    path = write(tmp_path, lines(*GOOD[:5], "2024-01-06,-9999,50", *GOOD[6:]))
    found = read_table(path, DataSection())
    assert found.values[5, 0] == -9999
    assert any(
        "'a' holds -9999 1 times" in warning and "data.sentinels=[-9999]" in warning
        for warning in found.report["warnings"]
    )
    masked = read_table(path, DataSection(missing="mask", sentinels=[-9999]))
    assert np.isnan(masked.values[5, 0])
    assert masked.report["missing"] == {"a": 1}


def test_numbers_that_only_look_like_sentinels_are_left_in_peace(tmp_path):
    text = "date,a\n" + "".join(f"{day},{9990 + i}\n" for i, day in enumerate(days(20)))
    assert read_table(write(tmp_path, text), DataSection()).report["warnings"] == []


def test_constants_are_reported(tmp_path):
    text = "date,a,b\n" + "".join(f"{day},3,{i}\n" for i, day in enumerate(days(5)))
    assert read_table(write(tmp_path, text), DataSection()).report["constant"] == ["a"]


def test_real_files(shared_data):
    folder = shared_data / "timeseries"
    etth1 = read_table(folder / "ett" / "ETTh1.csv", DataSection())
    assert (etth1.values.shape, etth1.columns[-1], etth1.clock.frequency) == ((17420, 7), "OT", "h")
    text = read_table(folder / "exchange_rate" / "exchange_rate.txt", DataSection())
    dated = read_table(folder / "exchange_rate" / "exchange_rate.csv", DataSection())
    assert text.values.shape == dated.values.shape == (7588, 8)
    # The same numbers, the last two columns swapped (data/README.md).
    assert np.array_equal(text.values[:, [0, 1, 2, 3, 4, 5, 7, 6]], dated.values)
    peyton = read_table(folder / "peyton" / "example_wp_log_peyton_manning.csv", DataSection(missing="mask"))
    assert peyton.report["gaps"].startswith("59 rows absent in 29 gaps")
    with pytest.raises(UserError, match="runs from new to old"):
        read_table(folder / "darts_small" / "us_gasoline.csv", DataSection())
    with pytest.raises(UserError, match=r"row 48, '132001 0:00' is not a date"):
        read_table(folder / "gefcom2014_load" / "L1-train.csv", DataSection())
