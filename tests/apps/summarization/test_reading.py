"""Files of the user: every form gives the same examples, every mistake is one line, nothing is left out unsaid."""

import gzip
import json
import re
from collections import Counter, defaultdict

import pandas as pd
import pytest

from apps.summarization.data import build_data, divide
from apps.summarization.documents import Example, shorten, source_from_sentences
from apps.summarization.reading import Report, read_part, read_set
from apps.summarization.recipe import DataSection
from core.training.errors import UserError


def read(path, **options):
    report = Report()
    return read_part(path, DataSection.model_validate(options), report), report


def test_all_forms_give_the_same(tmp_path, rows, write_rows):
    given = rows(3)
    jsonl = write_rows(tmp_path / "a.jsonl", given)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(jsonl.read_bytes()))
    frame = pd.DataFrame(given)
    frame.to_csv(tmp_path / "c.csv", index=False)
    frame.to_csv(tmp_path / "d.tsv", index=False, sep="\t")
    frame.to_parquet(tmp_path / "e.parquet")
    folder = tmp_path / "texts"
    folder.mkdir()
    for row in given:
        (folder / f"{row['id']}.txt").write_text(row["document"])
        (folder / f"{row['id']}.summary").write_text(row["summary"])
    wanted = [(row["id"], row["document"], (row["summary"],)) for row in given]
    for name in ("a.jsonl", "b.jsonl.gz", "c.csv", "d.tsv", "e.parquet", "texts"):
        found, _ = read(tmp_path / name)
        assert [(e.id, e.source.text, e.references) for e in found] == wanted, name
        assert len(found[0].source.sentences) == 9


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        ("{nonsense", r"own.jsonl, line 2: not JSON"),
        ({"summary": "x"}, r"own.jsonl, line 2: there is no column 'document'"),
        ({"document": "  ", "summary": "x"}, r"own.jsonl, line 2: empty document"),
        ({"document": "A text.", "summary": " . "}, r"own.jsonl, line 2: empty summary"),
        ({"document": 7, "summary": "x"}, r"own.jsonl, line 2: document must be text"),
        ({"id": "d0", "document": "A text.", "summary": "x"}, r"own.jsonl, line 2: the id 'd0' is there twice"),
        ({"document": "A text.", "summary": "x", "gold": [1]}, r"line 2: gold must be .* from 0 to 0"),
        ({"document": "A text.", "summary": "x", "query": 3}, r"line 2: query must be text"),
    ],
)
def test_a_bad_row_is_named_or_skipped_and_counted(tmp_path, bad, told, rows, write_rows):
    good = rows(2)
    path = write_rows(tmp_path / "own.jsonl", [good[0], bad, good[1]])
    with pytest.raises(UserError, match=told) as error:
        read(path)
    assert "\n" not in str(error.value)
    found, report = read(path, on_bad="skip", on_empty="skip", on_duplicate="skip")
    assert [example.id for example in found] == ["d0", "d1"]
    assert sum(report.counts.values()) == 1
    assert "line 2" in next(iter(report.named.values()))[0]


def test_a_column_of_another_name_is_suggested(tmp_path):
    path = tmp_path / "own.csv"
    pd.DataFrame({"documnet": ["A text."], "summary": ["x"]}).to_csv(path, index=False)
    with pytest.raises(UserError, match="did you mean 'documnet'"):
        read(path)
    found, _ = read(path, columns={"document": "documnet"})
    assert found[0].source.sentences == ["A text."]


def test_a_summary_longer_than_its_document_is_counted(tmp_path, rows, write_rows):
    path = write_rows(tmp_path / "own.jsonl", [*rows(1), {"id": "x", "document": "Short.", "summary": "Much longer."}])
    assert read(path)[1].counts["summary longer than its document"] == 1
    assert len(read(path, on_longer="skip")[0]) == 1
    with pytest.raises(UserError, match="line 2: summary longer"):
        read(path, on_longer="error")


def test_several_references_and_lists_of_sentences(tmp_path, write_rows):
    path = write_rows(tmp_path / "a.jsonl", [{"document": ["One  two.", "Three."], "summary": ["x", "y"]}])
    example = read(path)[0][0]
    assert example.source.sentences == ["One two.", "Three."]
    assert example.references == ("x", "y")


@pytest.mark.parametrize("overflow", ["head", "head_tail"])
def test_what_is_cut_off_is_counted(overflow):
    source = source_from_sentences("d", [f"s{i} a b c" for i in range(10)])
    short, lost = shorten(source, 17, overflow)
    assert short.numbers == ([0, 1, 2, 3] if overflow == "head" else [0, 1, 8, 9])
    assert lost == 24
    assert [source.sentences[i] for i in short.numbers] == short.sentences
    for sentence, (start, end) in zip(short.sentences, short.spans):
        assert short.text[start:end] == sentence
    assert shorten(source, 40, overflow) == (source, 0)


def test_equal_documents_stay_on_one_side_of_a_split():
    sources = [source_from_sentences(f"d{i}", [f"text {i} here"]) for i in range(10)]
    examples = [Example(f"{i}-{q}", source, f"q{q}", ("x",)) for i, source in enumerate(sources) for q in range(3)]
    parts = divide(examples, {"val": 0.2, "test": 0.2}, seed=0)
    texts = {part: {e.source.text for e in found} for part, found in parts.items()}
    assert {part: len(found) for part, found in parts.items()} == {"train": 18, "val": 6, "test": 6}
    assert not texts["train"] & (texts["test"] | texts["val"])
    assert not texts["val"] & texts["test"]
    with pytest.raises(UserError, match="2 different documents cannot be divided"):
        divide(examples[:6], {"val": 0.5, "test": 0.5}, seed=0)


def test_the_summary_of_the_data_tells_what_was_cut(small_recipe):
    data = build_data(small_recipe("extractive", "data.max_tokens=20"))
    assert data.summary["train"]["cut documents"] == len({e.source.text for e in data.train.examples})
    assert 0.5 < data.summary["train"]["share of words cut"] < 0.8
    writer = build_data(small_recipe("jsonl", "data.max_tokens=20", "model.max_summary=4"))
    assert writer.summary["train"]["cut documents"] == writer.summary["train"]["cut summaries"] == len(writer.train)
    assert all(len(writer.train[i]["ids"]) == 20 for i in range(len(writer.train)))


def test_papers_lose_title_and_abstract(tmp_path, write_rows):
    (tmp_path / "xml").mkdir()
    paper = (
        "<PAPER><S sid='0'>The Title</S><ABSTRACT><S>We show it.</S></ABSTRACT>"
        "<SECTION title='1 Introduction'><S>Once &amp;amp; for all.</S><S>Two.</S></SECTION></PAPER>"
    )
    lines = []
    for i in range(10):
        text = paper if i != 4 else paper.replace("ABSTRACT", "SECTION")
        (tmp_path / "xml" / f"P{i}.xml.gz").write_bytes(gzip.compress(text.encode()))
        lines.append({"id": f"P{i}", "human_summary": "The Title\nWe show it."})
    write_rows(tmp_path / "summaries.jsonl", lines)
    reports = defaultdict(Report)
    parts = read_set(tmp_path, DataSection(format="scisummnet"), reports)
    assert [e.id for e in parts["test"]] == ["P0", "P8"]
    assert sum(report.counts["abstract not marked"] for report in reports.values()) == 1
    source = parts["test"][0].source
    assert source.sentences == ["Once & for all.", "Two."]
    assert source.titles == ["1 Introduction"]
    leaky = read_set(tmp_path, DataSection(format="scisummnet", leak="none"), defaultdict(Report))
    assert leaky["test"][0].source.sentences[:2] == ["The Title", "We show it."]


def test_stories_keep_their_questions_together(tmp_path, write_rows):
    for part, count in (("train", 2), ("dev", 1), ("test", 1)):
        stories = [
            {
                "metadata": {"passage_id": f"{part}{i}"},
                "document": "Once upon a time. The end.",
                "questions": [
                    {"question_text": f"q{q}", "responses": [{"response_text": f"a{r}"} for r in range(4)]}
                    for q in range(5)
                ],
            }
            for i in range(count)
        ]
        write_rows(tmp_path / f"{part}.jsonl", stories)
    for questions, number in (("all", 10), ("plot", 2), ("focused", 8)):
        parts = read_set(tmp_path, DataSection(format="squality", questions=questions), defaultdict(Report))
        assert len(parts["train"]) == number
        assert {len(e.references) for e in parts["train"]} == {4}
    write_rows(tmp_path / "test.jsonl", [json.dumps({"document": "x", "questions": [{}]})])
    with pytest.raises(UserError, match=re.escape("test.jsonl, line 1: not a story of SQuALITY")):
        read_set(tmp_path, DataSection(format="squality"), defaultdict(Report))


ABSTRACT = (
    "We present a parser that reads whole sentences and builds their trees in linear time on real text. "
    "It needs no grammar at all and learns from trees."
)


def test_the_strict_rule_takes_out_what_repeats_the_abstract(tmp_path, write_rows):
    (tmp_path / "xml").mkdir()
    first, second = (text.strip(" .") + "." for text in ABSTRACT.split(". "))
    told = "<PAPER><ABSTRACT>{}</ABSTRACT><SECTION title=''>{}</SECTION></PAPER>"
    near = first.replace("linear time on real text", "time linear in the length")
    body = "".join(f"<S>{text}</S>" for text in (first, near, "Trees are old.", "We present a parser of another kind."))
    papers = {"P0": told.format(f"<S>{first}</S><S>{second}</S>", body), "P8": told.format("", body)}
    for name, text in papers.items():
        (tmp_path / "xml" / f"{name}.xml.gz").write_bytes(gzip.compress(text.encode()))
    rows = [{"id": name, "human_summary": ABSTRACT} for name in papers]
    write_rows(tmp_path / "summaries.jsonl", rows)
    read = {}
    for leak in ("clean", "strict"):
        reports = defaultdict(Report)
        parts = read_set(tmp_path, DataSection(format="scisummnet", leak=leak), reports)
        counts = sum((report.counts for report in reports.values()), Counter())
        read[leak] = {e.id: e.source.sentences for part in parts.values() for e in part}, counts
    assert len(read["clean"][0]["P0"]) == len(read["clean"][0]["P8"]) == 4
    assert read["strict"][0] == {"P0": ["Trees are old.", "We present a parser of another kind."]}
    assert read["strict"][1]["sentences that repeat an abstract"] == 2
    assert read["strict"][1]["abstract not marked"] == 1, "an empty abstract is none"


def test_a_writer_keeps_head_or_both_ends(small_recipe):
    whole = build_data(small_recipe("jsonl"))
    all_tokens = whole.train[0]["ids"].tolist()
    assert whole.summary["train"]["cut documents"] == 0
    for overflow, want in (("head", all_tokens[:20]), ("head_tail", all_tokens[:10] + all_tokens[-10:])):
        cut = build_data(small_recipe("jsonl", "data.max_tokens=20", f"data.overflow={overflow}"))
        assert cut.train[0]["ids"].tolist() == want
        share = cut.summary["train"]["share of tokens cut"]
        lengths = [len(whole.train[i]["ids"]) for i in range(len(whole.train))]
        assert share == pytest.approx(1 - 20 * len(lengths) / sum(lengths), abs=1e-4)
