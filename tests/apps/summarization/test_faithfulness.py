"""How a summary keeps to its source: counts that can be checked by hand."""

import pytest

from apps.summarization.faithfulness import faithfulness, fragments, names_of, numbers_of, repetition

SOURCE = "On Monday Anna Berg paid 1,200 euros. The ship left the harbour at 7.30 in heavy rain."


def test_a_copy_is_all_coverage_and_nothing_new():
    found = faithfulness(SOURCE, "The ship left the harbour")
    assert found["coverage"] == 1.0
    assert found["density"] == 5.0
    assert found["novel_1"] == found["novel_2"] == found["novel_3"] == 0.0


def test_pieces_are_the_longest_that_the_source_has():
    assert fragments(["a", "b", "c", "a", "b", "d", "e"], ["a", "b", "d", "x", "a", "b", "c"]) == [3, 3]
    assert fragments(["a", "b"], ["x", "y"]) == []
    # 6 words, pieces of 3 and 2: coverage 5 / 6, density (9 + 4) / 6.
    found = faithfulness("one two three four five", "one two three six four five")
    assert found["coverage"] == pytest.approx(5 / 6)
    assert found["density"] == pytest.approx(13 / 6)
    assert found["novel_2"] == pytest.approx(2 / 5)


def test_names_and_numbers_must_be_in_the_source():
    assert names_of("The men met Anna and Tom. Then I left Berlin.") == ["Anna", "Tom", "Berlin"]
    assert numbers_of("12 men, 1,200 euros, 7.30 and B52") == ["12", "1,200", "7.30"]
    found = faithfulness(SOURCE, "The sum that Anna paid to Otto was 1,200, at 8.30")
    assert found["names"] == 0.5
    assert found["numbers"] == 0.5


def test_repetition_counts_trigrams_that_come_again():
    assert repetition(["a", "b", "c", "a", "b", "c"]) == pytest.approx(1 / 4)
    assert repetition(["a", "b"]) == 0.0


def test_an_empty_summary_is_no_division_by_zero():
    found = faithfulness(SOURCE, "")
    assert found["coverage"] == found["novel_2"] == found["repetition"] == 0.0
    assert found["names"] == 1.0
