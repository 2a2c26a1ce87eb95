"""The extractor: padding changes nothing, every position can see the question, redundancy and gold labels work."""

import pytest
import torch

from apps.summarization.data import build_data
from apps.summarization.documents import Example, source_from_sentences
from apps.summarization.extractive import Extractor
from apps.summarization.items import ExtractiveItems, collate_extractive
from apps.summarization.sentence_encoder import SentenceEncoder, Words
from apps.summarization.task import build_task
from core.training.errors import UserError

SPEC = {"vocabulary": ["the", "ship", "sank", "storm", "who", "farm"], "features": 0, "queries": True}


def examples():
    return [
        Example(
            "a", source_from_sentences("a", ["The ship sank.", "A storm.", "The farm, the farm."]), "who sank", ("x",)
        ),
        Example("b", source_from_sentences("b", ["A farm."]), None, ("x",)),
        Example("c", source_from_sentences("c", [f"ship {'storm ' * (i % 3)}" for i in range(9)]), "who", ("x",)),
    ]


def extractor(variant="softmax", depth=0, **options):
    torch.manual_seed(0)
    encoder = {"dim": 16, "depth": 2, "heads": 2, "dropout": 0.0, "attention": {"variant": variant, **options}}
    return Extractor(encoder, features=0, vocabulary=8, word_dim=8, sentence_depth=depth, query=True).eval()


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("variant", ["softmax", "window", "linear", "hybrid", "longformer"])
def test_a_padded_batch_gives_what_each_document_gives_alone(variant, depth):
    model = extractor(variant, depth)
    items = ExtractiveItems(examples(), SPEC, None, "test")
    batch = collate_extractive([items[i] for i in range(3)])
    with torch.no_grad():
        together = model(batch["words"], None, batch["query"])
        for i in range(3):
            alone = collate_extractive([items[i]])
            one = model(alone["words"], None, alone["query"])[0]
            torch.testing.assert_close(together[i, : len(one)], one, atol=2e-5, rtol=1e-4)
            assert together[i, len(one) :].isneginf().all()


@pytest.mark.parametrize("variant", ["softmax", "linear", "longformer"])
def test_every_sentence_sees_the_question_and_it_gets_a_gradient(variant):
    model = extractor(variant)
    items = ExtractiveItems(examples(), SPEC, None, "test")
    batch = collate_extractive([items[2]])
    scores = model(batch["words"], None, batch["query"])
    other = model(batch["words"], None, torch.tensor([[3]]))
    assert ((scores - other).abs() > 1e-7).all()
    scores.sum().backward()
    assert model.query.weight.grad[items[2]["query"]].abs().sum() > 0


@pytest.mark.parametrize("variant", ["softmax", "window", "hybrid", "longformer"])
def test_documents_end_to_end_give_what_padded_ones_give(variant):
    model = extractor(variant)
    items = ExtractiveItems(examples(), SPEC, None, "test")
    batch = collate_extractive([items[i] for i in range(3)])
    found = []
    for packed in (False, True):
        model.packed = packed
        model.zero_grad()
        scores = model.score(batch)
        scores[batch["words"].mask].square().sum().backward()
        found.append((scores, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
    for padded, packed in zip(*found):
        torch.testing.assert_close(packed, padded, atol=2e-5, rtol=1e-4)


def test_words_that_weigh_more_count_more():
    encoder = SentenceEncoder(5, 3)
    words = Words(torch.tensor([1, 2, 2]), torch.tensor([0, 0, 1]), torch.ones(1, 2, dtype=torch.bool))
    with torch.no_grad():
        encoder.weight.weight[1] = 2.0
        found = encoder(words)
    share = torch.tensor(2.0).exp() / (torch.tensor(2.0).exp() + 1)
    table = encoder.table.weight
    torch.testing.assert_close(found[0], share * table[1] + (1 - share) * table[2])
    torch.testing.assert_close(found[1], table[2])


def test_gold_labels_are_used_and_asked_for(rows, write_rows, tmp_path, small_recipe):
    given = [{**row, "gold": [0, 3]} for row in rows()]
    path = write_rows(tmp_path / "gold.jsonl", given)
    recipe = small_recipe("extractive", f"data.train={path}", "model.labels=gold")
    data = build_data(recipe)
    assert data.train[0]["labels"].tolist() == [1, 0, 0, 1, 0, 0, 0, 0, 0]
    loss, _ = build_task(recipe, data.spec).loss(data.collate([data.train[0], data.train[1]]))
    assert 0 < float(loss.detach()) < 2
    with pytest.raises(UserError, match=r"model.labels=gold needs the column 'gold'"):
        build_data(small_recipe("extractive", "model.labels=gold"))


def test_gold_numbers_follow_the_sentences_that_stay(rows, write_rows, tmp_path, small_recipe):
    path = write_rows(tmp_path / "gold.jsonl", [{**row, "gold": [0, 8]} for row in rows()])
    options = (f"data.train={path}", "model.labels=gold", "data.max_tokens=20", "data.overflow=head_tail")
    train = build_data(small_recipe("extractive", *options)).train
    source = train.examples[0].source
    assert [source.numbers[i] for i in train.examples[0].gold] == [0, 8]
    assert train[0]["labels"].sum() == 2


def test_nothing_to_tell_sentences_apart_is_refused(small_recipe):
    recipe = small_recipe("extractive", "model.words=0", "model.features=false")
    data = build_data(recipe)
    with pytest.raises(ValueError, match="nothing to tell sentences apart"):
        build_task(recipe, data.spec)
