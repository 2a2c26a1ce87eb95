"""Files of recipes: the user's path wins, public files are found in LONGSPAN_DATA, and errors say what to do."""

import pytest

from core.training.errors import UserError
from core.training.files import find_file


def test_public_files_are_found_in_the_data_folder(tmp_path, monkeypatch):
    def find(given=None):
        return find_file(given, app="timeseries", public="ett/ETTh1.csv", origin="https://example.org/ETDataset")

    monkeypatch.delenv("LONGSPAN_DATA", raising=False)
    with pytest.raises(
        UserError, match=r"ett/ETTh1.csv is not here \(LONGSPAN_DATA is not set\): .*example.org/ETDataset"
    ):
        find()
    monkeypatch.setenv("LONGSPAN_DATA", str(tmp_path))
    with pytest.raises(UserError, match="not in LONGSPAN_DATA="):
        find()
    for place in ("ETTh1.csv", "ett/ETTh1.csv", "timeseries/ett/ETTh1.csv"):
        path = tmp_path / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
        assert find() == path, "the more exact place wins"
    (tmp_path / "mine.csv").write_text("")
    assert find(str(tmp_path / "mine.csv")).name == "mine.csv"


def test_a_path_that_is_not_there_names_its_key_and_neighbour(tmp_path):
    (tmp_path / "reads.fasta").write_text("")
    with pytest.raises(
        UserError, match=r"data.train: there is no file '.*read.fasta' \(did you mean 'reads.fasta'\?\)"
    ):
        find_file(str(tmp_path / "read.fasta"), app="genomics", key="data.train")
    with pytest.raises(UserError, match=r"data\.train is missing"):
        find_file(None, app="genomics", key="data.train")
