"""Rows of CSV, TSV, JSON lines and Parquet: same values, every row knows its place, every mistake is one line."""

import gzip
import json

import pytest

from core.training.errors import UserError
from core.training.rows import read_rows

RECORDS = [{"id": "a", "text": "one, two"}, {"id": "b", "text": 'a "quoted"\nline'}, {"id": "c", "text": "ä"}]


def write(path):
    import csv
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(RECORDS), path)
        return path
    text = io.StringIO()
    if name.endswith(".jsonl"):
        text.write("".join(json.dumps(record) + "\n" for record in RECORDS))
    else:
        table = csv.DictWriter(text, ["id", "text"], delimiter="\t" if name.endswith(".tsv") else ",")
        table.writeheader()
        table.writerows(RECORDS)
    data = text.getvalue().encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.parquet", "a.csv.gz", "a.jsonl.gz"])
def test_every_form_gives_the_same_rows(tmp_path, name):
    rows = list(read_rows(write(tmp_path / name), columns=["text", "id"]))
    assert [row.values for row in rows] == RECORDS
    assert len({row.where for row in rows}) == 3
    with pytest.raises(UserError, match=r"no column 'tex' \(did you mean 'text'\?\); columns: id, text"):
        list(read_rows(tmp_path / name, columns=["tex"]))


def test_a_row_stands_where_an_editor_shows_it(tmp_path):
    rows = list(read_rows(write(tmp_path / "a.csv")))
    assert [row.where.rpartition(", ")[2] for row in rows] == ["line 2", "line 3", "line 5"]


def test_a_cell_may_be_longer_than_the_csv_modules_limit(tmp_path):
    (tmp_path / "a.csv").write_text("id,sequence\n1," + "A" * 300_000 + "\n")
    (row,) = read_rows(tmp_path / "a.csv")
    assert len(row.values["sequence"]) == 300_000


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("a.csv", "id,text\n1,x\n2,y,z\n", "line 3: 3 cells, the header has 2"),
        ("a.jsonl", '{"id": 1}\n{"id": 2,}\n', "line 2: not JSON: "),
        ("a.jsonl", '{"id": 1}\n[2]\n', "line 2: must be an object, got list"),
        ("a.csv", "id,id\n1,2\n", "column 'id' is there twice"),
        ("a.csv", "", r"is empty \(0 bytes\)"),
        ("a.doc", "x", "unknown form .doc"),
        ("a.jsonl", '[{"id": 1}]', "a list; JSON lines are wanted"),
    ],
)
def test_a_mistake_in_the_file_is_one_line(tmp_path, name, text, match):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=match) as caught:
        list(read_rows(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_bad_rows_can_be_counted_and_left_out(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"id": 1}\nnot json\n{"ix": 2}\n{"id": 3}\n')
    said = []
    rows = list(read_rows(tmp_path / "a.jsonl", columns=["id"], on_bad=said.append))
    assert [row.values["id"] for row in rows] == [1, 3]
    assert [text.partition(": ")[0].rpartition(", ")[2] for text in said] == ["line 2", "line 3"]


def test_bytes_that_are_not_text_are_told_with_their_place(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"id,text\n1,fine\n2,\xff\xfe\n")
    with pytest.raises(UserError, match="not UTF-8"):
        list(read_rows(tmp_path / "a.csv"))
    whole = gzip.compress(b"id,text\n" + b"".join(b"%d,abcdefg\n" % i for i in range(9999)))
    (tmp_path / "a.csv.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="not a whole gzip file"):
        list(read_rows(tmp_path / "a.csv.gz"))
    (tmp_path / "b.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(UserError, match="not a readable Parquet file"):
        read_rows(tmp_path / "b.parquet")


def test_the_hub_is_asked_with_what_was_written(monkeypatch):
    import datasets

    asked = []

    def load(name, configuration, *, split):
        asked.append((name, configuration, split))
        return datasets.Dataset.from_list(RECORDS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = list(read_rows("hub:org/name@cfg:test[:10]", columns=["text"]))
    assert asked == [("org/name", "cfg", "test[:10]")]
    assert rows[2].values == RECORDS[2]
    list(read_rows("hub:name"))
    assert asked[1] == ("name", None, "train")
    with pytest.raises(UserError, match="must have the form hub:"):
        read_rows("hub:")


def test_an_unreachable_hub_is_one_line(monkeypatch):
    import datasets

    def load(*_, **__):
        raise ConnectionError("no route\nlong story")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(UserError, match=r"hub:org/name: cannot be loaded: ConnectionError: no route$"):
        read_rows("hub:org/name")


def test_a_gzip_file_that_is_damaged_inside_is_named(tmp_path):
    path = tmp_path / "x.csv.gz"
    content = bytearray(gzip.compress(("a,b\n" + "1,2\n" * 50_000).encode()))
    content[40:60] = bytes(20)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"x\.csv\.gz: after line \d+: not a whole gzip file"):
        list(read_rows(path))
