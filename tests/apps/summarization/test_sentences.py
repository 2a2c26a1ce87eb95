"""Sentence borders: where prose has them, and where it only looks so."""

import pytest

from apps.summarization.sentences import split_sentences


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("One. Two! Three?", ["One.", "Two!", "Three?"]),
        ("Dr. Smith met Mr. Jones. They left.", ["Dr. Smith met Mr. Jones.", "They left."]),
        ("J. R. Smith wrote it. Good.", ["J. R. Smith wrote it.", "Good."]),
        ("It cost 3.5 dollars. Cheap.", ["It cost 3.5 dollars.", "Cheap."]),
        ('"Stop!" he said. "Why?"', ['"Stop!" he said.', '"Why?"']),
        (
            "See Fig. 3 for details, e.g. the tail. It is long.",
            ["See Fig. 3 for details, e.g. the tail.", "It is long."],
        ),
        ("He waited... Then he left.", ["He waited...", "Then he left."]),
        ("A title\n\nThe text begins.", ["A title", "The text begins."]),
        ("memory,\n   \n  and had brought him", ["memory, and had brought him"]),
        ("first half of a\n\nsentence goes on. End.", ["first half of a sentence goes on.", "End."]),
        ("今日は晴れ。明日は雨。", ["今日は晴れ。", "明日は雨。"]),
        ("  \n ", []),
        ("no stop at all", ["no stop at all"]),
    ],
)
def test_borders(text, wanted):
    assert [sentence.text for sentence in split_sentences(text)] == wanted


def test_spans_point_into_the_text_and_nothing_is_lost():
    text = '  "Well," he  said.\nThen—nothing. \n\n CHAPTER I\n\nIt was late; Mr. Hall slept. '
    found = split_sentences(text)
    for sentence in found:
        assert " ".join(text[sentence.start : sentence.end].split()) == sentence.text
    assert "".join(s.text for s in found).replace(" ", "") == "".join(text.split())
