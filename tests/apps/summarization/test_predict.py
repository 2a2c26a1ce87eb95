"""From a user's file to a summary, its sentences and a page; and what a test leaves in the run folder."""

import csv
import html
import json
import re
import shutil
import sys

import pytest
import torch

from apps.summarization.data import build_data
from apps.summarization.measuring import with_peak
from apps.summarization.tokens import Tokens, load_tokens, train_tokens
from core.training.errors import UserError
from core.training.fit import fit
from core.training.predict import inspect, predict
from core.training.run import load_run


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def run(shared, small_recipe):
    """One run per kind, trained once for all tests here."""

    def trained(kind: str):
        folder = shared / kind
        if not folder.exists():
            if kind == "extractive":
                fit(small_recipe("extractive", "predict.sentences=2"), run_dir=folder, quiet=True)
            else:
                extra = ["model.source_words=30"] if kind == "extract_abstract" else []
                extra += [f"model.kind={kind}", "attention=linear", "predict.decoding=greedy", "trainer.accumulate=1"]
                fit(small_recipe("jsonl", *extra), run_dir=folder, quiet=True)
        return folder

    return trained


@pytest.mark.parametrize("kind", ["extractive", "abstractive", "extract_abstract"])
def test_rows_come_back_with_summary_sentences_and_scores(run, own_file, tmp_path, kind):
    (file,) = predict(run(kind), own_file, tmp_path / "out.jsonl")
    found = [json.loads(line) for line in file.read_text().splitlines()]
    texts = [json.loads(line) for line in own_file.read_text().splitlines()]
    assert [row["id"] for row in found] == [row["id"] for row in texts]
    for row, given in zip(found, texts):
        assert {"rouge1", "rougeLsum", "novel_2", "density", "repetition", "names", "numbers"} <= set(row["scores"])
        if kind == "abstractive":
            assert "sentences" not in row
            continue
        pieces = [" ".join(given["document"][start:end].split()) for start, end in row["spans"]]
        assert len(pieces) == len(row["sentences"])
        if kind == "extractive":
            assert row["summary"].split("\n") == pieces
            assert len(pieces) == 2
            assert row["scores"]["novel_2"] < 0.2
            assert row["scores"]["coverage"] == row["scores"]["names"] == 1.0
        else:
            assert 20 <= sum(len(piece.split()) for piece in pieces) <= 33


def test_a_text_file_without_summary_and_settings_that_change(run, tmp_path):
    text = tmp_path / "new.txt"
    text.write_text("A first sentence is here. The second one follows it. " * 10)
    (file,) = predict(run("extractive"), text, tmp_path / "out.txt", ["predict.sentences=null", "predict.words=30"])
    assert 24 <= len(file.read_text().split()) <= 33
    with pytest.raises(UserError, match=r"out.pdf: predictions are written as .jsonl .* .html"):
        predict(run("extractive"), text, tmp_path / "out.pdf")
    text.write_text(" \n ")
    with pytest.raises(UserError, match=r"new.txt: empty document"):
        predict(run("extractive"), text, tmp_path / "out.txt")


def test_a_page_marks_the_chosen_sentences_and_needs_nothing_else(run, own_file, tmp_path):
    (page,) = predict(run("extractive"), own_file, tmp_path / "out.html")
    text = page.read_text()
    (table,) = predict(run("extractive"), own_file, tmp_path / "out.jsonl")
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    wanted = [sentence for row in rows for sentence in row["summary"].split("\n")]
    assert [html.unescape(one) for one in re.findall(r"<mark [^>]*>(.*?)</mark>", text)] == wanted
    assert not re.search(r"<(script|link|img)|https?://", text)


def test_what_a_user_writes_cannot_break_the_page(run, write_rows, tmp_path):
    given = write_rows(
        tmp_path / "x.jsonl", [{"id": "<b>", "document": "<script>alert(1)</script> is & here. Two words here."}]
    )
    (page,) = predict(run("extractive"), given, tmp_path / "out.html")
    assert "<script>" not in page.read_text()
    assert "<b>" not in page.read_text()


@pytest.mark.parametrize("kind", ["extractive", "abstractive", "extract_abstract"])
def test_inspect_gives_every_sentence_an_attribution(run, own_file, tmp_path, kind):
    page, table = inspect(run(kind), own_file, tmp_path / "inside")
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    assert page.stat().st_size > 2000
    for row in rows:
        assert len(row["attribution"]) == 9
        assert max(row["attribution"]) > 0
        assert min(row["attribution"]) >= 0
        assert len(row["attention"]) == 9
        assert sum(row["attention"]) == pytest.approx(1.0, abs=1e-3), "weights of the whole document"
        if kind == "extract_abstract":
            assert [a == 0 for a in row["attribution"]] == [a == 0 for a in row["attention"]]
            assert row["attribution"].count(0.0) > 0, "sentences that were not handed on have no part in it"


def test_the_run_folder_holds_what_the_test_found(run):
    folder = run("extractive")
    metrics = json.loads((folder / "metrics.json").read_text())
    with (folder / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    mean = sum(100 * float(row["rouge1"]) for row in rows) / len(rows)
    assert metrics["test"]["rouge1"] == pytest.approx(mean, abs=1e-2)
    lead = sum(100 * float(row["rouge1_lead"]) for row in rows) / len(rows)
    assert metrics["floors"]["lead"]["rouge1"] == pytest.approx(lead, abs=1e-2)
    assert metrics["test"]["rouge1_over_lead"] == pytest.approx(mean - lead, abs=2e-2)
    assert set(metrics["floors"]) == {"lead", "random", "textrank", "lexrank", "optimum"}
    for name in (
        "predictions.jsonl",
        "by_length.csv",
        "by_place.csv",
        "plots/by_length.png",
        "plots/by_place.png",
        "plots/cost_by_length.png",
    ):
        assert (folder / name).stat().st_size > 50
    assert json.loads((folder / "predictions.jsonl").read_text().splitlines()[0])["scorer"].startswith(
        "F x 100, Porter"
    )
    assert load_run(folder).spec["vocabulary"]


@pytest.mark.parametrize("kind", ["bpe", "unigram", "words", "bytes"])
def test_tokenizers_give_the_text_back(kind, own_file, tmp_path):
    texts = [json.loads(line)["document"] for line in own_file.read_text().splitlines()] + ["Ünïcödé 世界"]
    tokens = train_tokens(kind, texts, 400)
    again = Tokens(**json.loads(json.dumps(tokens.plain())))
    assert again.encode(texts[0]) == tokens.encode(texts[0])
    assert min(tokens.encode(texts[0])) >= (3 if kind in ("words", "unigram") else 5)
    assert max(tokens.encode(texts[0])) < tokens.size
    if kind == "words":
        assert tokens.decode(tokens.encode("Anna0 found the map")) == "Anna0 found the map"
    else:
        assert tokens.decode(tokens.encode(texts[0])) == texts[0]
    if kind != "bytes":
        loaded = load_tokens(tokens.save(tmp_path / "tokenizer.json"))
        assert loaded.encode(texts[0]) == tokens.encode(texts[0])


def test_a_tokenizer_file_is_used_and_a_wrong_one_is_named(small_recipe, tmp_path):
    path = train_tokens("bpe", ["the map of the island"] * 3, 270).save(tmp_path / "tokenizer.json")
    data = build_data(small_recipe("jsonl", f"model.tokenizer_file={path}"))
    assert Tokens(**data.spec["tokenizer"]).size <= 270
    path.write_text("{}")
    with pytest.raises(UserError, match=r"is not a tokenizer.json"):
        build_data(small_recipe("jsonl", f"model.tokenizer_file={path}"))


def test_a_trained_extractor_chooses_what_the_writer_reads(run, small_recipe, own_file, tmp_path):
    known = tmp_path / "extractor"
    shutil.copytree(run("extractive"), known)
    options = ("model.kind=extract_abstract", "model.source_words=30", "attention=linear", "trainer.accumulate=1")
    recipe = small_recipe("jsonl", *options, f"model.extractor={known}", "predict.decoding=greedy")
    fit(recipe, run_dir=tmp_path / "run", quiet=True)
    shutil.rmtree(known)  # the run folder alone is enough
    loaded = load_run(tmp_path / "run")
    assert not any(p.requires_grad for p in loaded.task.model.chooser.parameters())

    def sentences(folder, *overrides):
        (file,) = predict(folder, own_file, tmp_path / "out.jsonl", overrides)
        return [json.loads(line)["sentences"] for line in file.read_text().splitlines()]

    found = sentences(tmp_path / "run")
    assert found == sentences(run("extractive"), "predict.words=30", "predict.sentences=null")
    assert found != sentences(run("extract_abstract")), "LexRank would have chosen the same"
    recipe = small_recipe("jsonl", *options, f"model.extractor={tmp_path / 'run'}")
    with pytest.raises(UserError, match=r"model.extractor: .* is a run of extract_abstract; name one of kind=extract"):
        build_data(recipe)
    with pytest.raises(UserError, match=r"model.extractor: there is no file"):
        build_data(small_recipe("jsonl", *options, f"model.extractor={known}"))


def test_weights_of_another_run_are_a_start(run, small_recipe, tmp_path):
    recipe = small_recipe("extractive", f"model.pretrained={run('extractive')}", "optim.lr=1e-12")
    fit(recipe, run_dir=tmp_path / "again", quiet=True)
    old, new = (load_run(folder).task.model.head[0].weight for folder in (run("extractive"), tmp_path / "again"))
    assert (old - new).abs().max() < 1e-6
    with pytest.raises(UserError, match=r"model.pretrained: there is no file"):
        fit(small_recipe("extractive", "model.pretrained=nowhere"), run_dir=tmp_path / "nowhere", quiet=True)
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from Linux' /proc")
def test_the_peak_is_that_of_the_run_alone():
    held = torch.ones(2**24)  # 64 MiB that were there before
    size, peak = with_peak(lambda: torch.ones(2**23).sum() + held[0], torch.device("cpu"))
    assert float(size) == 2**23 + 1
    assert 30 * 2**20 < peak < 50 * 2**20, f"{peak / 2**20:.1f} MiB of 32"


def test_cost_by_length_is_reported(run):
    with (run("abstractive") / "by_length.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        assert float(row["tokens_per_s"]) > float(row["words_per_s"]) > 0
        assert row["peak_mb"] != "" or sys.platform != "linux"
    metrics = json.loads((run("abstractive") / "metrics.json").read_text())["test"]
    assert metrics["state_kb"] > 0
    assert metrics["ms_per_token"] > 0
