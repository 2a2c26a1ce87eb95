"""The demo's truth, what recipes refuse, what a loss reaches, and the extracts that the real data must give."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from apps.summarization.baselines import floors
from apps.summarization.data import build_data
from apps.summarization.generated import MARK, RUMOUR, generate
from apps.summarization.recipe import GeneratedSection
from apps.summarization.task import build_task
from core.training.data import eval_loader
from core.training.errors import UserError
from core.training.fit import fit
from core.training.recipe import load_recipe

TINY = yaml.safe_load((Path(__file__).parent / "tiny.yaml").read_text())


def test_the_summary_is_what_stands_at_the_marks():
    options = GeneratedSection(documents=20, held_out=5, words=400, shortest=300)
    for part, examples in generate(options).items():
        for example in examples:
            words = " ".join(example.source.sentences).split()
            marked = {words[i + 1]: words[i + 2] for i, word in enumerate(words) if word == MARK}
            rumoured = {words[i + 1]: words[i + 2] for i, word in enumerate(words) if word == RUMOUR}
            summary = example.references[0].split()
            assert dict(zip(summary[::2], summary[1::2])) == marked
            assert set(marked) == set(rumoured)
            assert all(marked[kind] != rumoured[kind] for kind in marked)
            if part != "train":
                assert 300 <= len(words) <= 400 + 40 + len(example.source.sentences)
    again = generate(options)["test"][2]
    assert again.source.text == generate(options)["test"][2].source.text


def test_the_optimum_is_a_hundred_and_the_oracle_of_extracts_is_not():
    recipe = load_recipe("summarization/demo", TINY)
    data = build_data(recipe)
    found = floors(recipe, data)
    assert found["optimum"]["rouge1"] == found["optimum"]["rouge2"] == 100.0
    assert found["oracle"]["rouge1"] < 70
    assert found["lead"]["rouge1"] < found["oracle"]["rouge1"]


def test_a_perfect_summary_scores_the_optimum_in_the_task():
    recipe = load_recipe("summarization/demo", TINY)
    data = build_data(recipe)
    task = build_task(recipe, data.spec).eval()

    def perfect(batch, examples):
        from apps.summarization.task import Outcome

        return [Outcome(example, example.references[0]) for example in examples]

    task._write = perfect
    with torch.no_grad():
        for batch in eval_loader(data, "test", batch_size=3):
            task.eval_update(batch)
    found = task.eval_compute()
    assert found["rouge1"] == found["rougeLsum"] == 100.0
    assert found["exact"] == 1.0
    assert found["rouge1_over_lead"] == pytest.approx(100 - floors(recipe, data)["lead"]["rouge1"])
    assert found["rouge1_over_lead_low"] > 0


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["model.pointer=true"], "pointer copies single tokens and needs reader=tokens"),
        (["model.cross=gla"], "cross-attention must be one variant that can cross"),
        (["model.cross.stride=3"], "stride must divide the 4 heads, got 3"),
        (["data.generated.shortest=900", "data.generated.words=800"], "shortest must not exceed words"),
        (["model.reader=sentence"], "model.reader must be 'tokens', 'patches' or 'sentences'"),
        (["predict.beam=3"], r"unknown key 'predict.beam' \(did you mean 'beams'"),
        (["predict.beams=8"], "beams belongs to decoding=beam and would not be used here"),
        (["predict.top_p=0.5"], "top_p belongs to decoding=sample"),
        (["model.words=10"], "words belongs to kind=extractive"),
        (["model.patch=4"], "patch belongs to reader=patches"),
        (["model.source_words=99"], "source_words belongs to kind=extract_abstract"),
        (["model.global_tokens=first"], "needs attention that takes global tokens"),
        (["model.checkpoint=x"], "checkpoint brings its own: leave reader out"),
        (["backbone.positions=learned"], "has a fixed length"),
        (["model.decoder_attention=linformer"], "cannot do 'causal'"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(overrides, told, tmp_path):
    tiny = [line for line in TINY if not any(line.split("=")[0] == o.split("=")[0] for o in overrides)]
    with pytest.raises(UserError, match=told) as error:
        fit(load_recipe("summarization/demo", [*tiny, *overrides]), run_dir=tmp_path / "run", quiet=True)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_no_data_is_an_error_that_says_what_to_do():
    with pytest.raises(UserError, match=r"data.train is missing: name your file .* data.train=my.jsonl"):
        build_data(load_recipe("summarization/extractive"))
    recipe = load_recipe("summarization/checkpoint")
    recipe.data.generated = GeneratedSection(documents=6, held_out=4, words=100, shortest=80)
    with pytest.raises(UserError, match=r"model\.checkpoint: bart-large holds no config\.json"):
        build_data(recipe)


@pytest.mark.parametrize("labels", ["soft", "oracle"])
def test_training_on_labels_beats_the_start(small_recipe, labels, tmp_path):
    recipe = small_recipe(
        "extractive", f"model.labels={labels}", "trainer.epochs=30", "optim.lr=1e-2", "predict.words=14"
    )
    result = fit(recipe, run_dir=tmp_path / "run", quiet=True)
    losses = [float(row.split(",")[2]) for row in (tmp_path / "run" / "metrics.csv").read_text().splitlines()[1:]]
    assert losses[-1] < 0.6 * losses[0]
    # The summary is made of the first and the fourth sentence of each story: 14 words that can be found.
    assert result.metrics["test"]["rouge1"] > result.metrics["floors"]["lead"]["rouge1"] + 10


def test_padding_is_little_where_lengths_are_put_together():
    recipe = load_recipe(
        "summarization/demo",
        [
            "data.generated.documents=200",
            "data.generated.held_out=4",
            "data.generated.words=100",
            "data.generated.shortest=80",
            "trainer.batch_size=4",
        ],
    )
    data = build_data(recipe)
    assert data.summary["padding share of training batches"] < 0.1
    lengths = np.array(data.lengths)
    assert lengths.max() > 3 * lengths.min()


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "rouge1", "rouge2"), [("squality", 36.5, 7.0), ("scisummnet", 44.0, 19.5)])
def test_a_trained_extractor_beats_lead_and_lexrank(recipe, rouge1, rouge2, shared_data, tmp_path):
    folder = shared_data / "summarization" / recipe
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent")
    result = fit(load_recipe(f"summarization/{recipe}", [f"data.path={folder}"]), run_dir=tmp_path / "run", quiet=True)
    test = json.loads((tmp_path / "run" / "metrics.json").read_text())["test"]
    assert result.metrics["test"] == test
    assert test["rouge1"] > rouge1
    assert test["rouge2"] > rouge2
    for floor in ("lead", "lexrank"):
        assert test[f"rouge1_over_{floor}_low"] > 0
        assert test[f"rouge2_over_{floor}_low"] > 0


@pytest.mark.parametrize(("tokenizer", "reader"), [("bytes", "patches"), ("unigram", "tokens"), ("bpe", "sentences")])
def test_every_token_of_a_document_is_read_and_the_loss_falls(small_recipe, tokenizer, reader):
    options = ("model.pointer=false", "optim.lr=1e-2", *(["model.patch=4"] if reader == "patches" else []))
    recipe = small_recipe("jsonl", f"model.tokenizer={tokenizer}", f"model.reader={reader}", *options)
    data = build_data(recipe)
    task = build_task(recipe, data.spec)
    text = " ".join(data.train.examples[0].source.sentences)
    assert task.tokens.decode(data.train[0]["ids"].tolist()) == text
    batch = data.collate([data.train[0], data.train[1]])
    optimizer = torch.optim.AdamW(task.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss, _ = task.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
