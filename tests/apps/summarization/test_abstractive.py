"""The writer: padding, readers, global tokens, pointer, smoothing; decoding with a cache equals decoding without."""

import math

import pytest
import torch

from apps.summarization.abstractive import Document, Writer
from apps.summarization.decoding import Speed, write
from apps.summarization.recipe import PredictSection
from apps.summarization.sentence_encoder import Words
from apps.summarization.tokens import BEGIN, END, PAD

VOCABULARY = 20


def writer(attention="softmax", cross="softmax", decoder="softmax", seed=0, **options):
    torch.manual_seed(seed)
    encoder = {"dim": 16, "depth": 1, "heads": 2, "dropout": 0.0, "attention": given(attention)}
    stack = {
        "dim": 16,
        "depth": 2,
        "heads": 2,
        "positions": "sinusoidal",
        "attention": given(decoder),
        "cross": given(cross),
    }
    model = Writer(VOCABULARY, encoder, stack, **options).eval()
    with torch.no_grad():
        model.bias.normal_()  # so that summaries differ from each other and come to an end
    return model


def given(variant):
    return {"variant": variant, "stride": 2} if variant == "hepos" else {"variant": variant}


def document(sizes=(13, 7, 1), marked=None):
    torch.manual_seed(1)
    ids = torch.zeros(len(sizes), max(sizes), dtype=torch.int64)
    for row, size in enumerate(sizes):
        ids[row, :size] = torch.randint(5, VOCABULARY, (size,))
    return Document(ids, None, marked)


@pytest.mark.parametrize("pointer", [False, True])
@pytest.mark.parametrize("cross", ["softmax", "hepos", "linear"])
@pytest.mark.parametrize("decoder", ["softmax", "linear", "gla"])
@pytest.mark.parametrize(
    "options",
    [
        {"decoding": "greedy"},
        {"decoding": "beam", "beams": 3, "length_penalty": 1.5},
        {"decoding": "beam", "beams": 2, "early_stopping": False, "no_repeat_ngram": 2, "min_tokens": 4},
        {"decoding": "sample", "top_k": 9, "top_p": 0.9, "temperature": 1.3, "seed": 3},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_with_a_cache_as_without(options, decoder, cross, pointer):
    model = writer(cross=cross, decoder=decoder, pointer=pointer)
    how = PredictSection.model_validate(options)
    cached = write(model, document(), how, 9)
    plain = write(model, document(), how, 9, cached=False)
    assert [one.tokens for one in cached] == [one.tokens for one in plain]
    assert [one.score for one in cached] == pytest.approx([one.score for one in plain], abs=1e-4)
    assert len({round(one.score, 4) for one in cached}) > 1, "the documents make no difference"


@pytest.mark.parametrize("decoding", ["greedy", "beam"])
def test_a_document_in_a_batch_is_summarised_as_alone(decoding):
    model = writer("hybrid", "hepos", "linear")
    how = PredictSection(decoding=decoding)
    together = write(model, document(), how, 9)
    for row, size in enumerate((13, 7, 1)):
        alone = write(model, Document(document().ids[row : row + 1, :size]), how, 9)[0]
        assert alone.tokens == together[row].tokens
        assert alone.score == pytest.approx(together[row].score, abs=1e-4)


def test_many_beams_find_the_likeliest_summary():
    model, text = writer(), document((5,))
    found = write(model, text, PredictSection(decoding="beam", beams=200, length_penalty=0.0, early_stopping=False), 3)[
        0
    ]
    memory = model.encode(text)
    best = (-math.inf, [])

    def grow(tokens, score):
        nonlocal best
        states = model.decoder(
            model.table(torch.tensor([tokens])) * model.scale, memory.vectors, context_mask=memory.mask
        )
        after = model.predict(states, memory)[0, -1]
        best = max(best, (score + float(after[END]), tokens[1:]))
        if len(tokens) < 3:
            for token in range(5, VOCABULARY):
                grow([*tokens, token], score + float(after[token]))

    with torch.no_grad():
        grow([BEGIN], 0.0)
    assert found.tokens == best[1]
    assert found.score == pytest.approx(best[0], abs=1e-4)


def test_a_larger_length_penalty_gives_longer_summaries():
    model = writer()
    sizes = [
        sum(
            len(one.tokens)
            for one in write(
                model, document(), PredictSection(decoding="beam", beams=8, length_penalty=p, early_stopping=False), 20
            )
        )
        for p in (0.0, 1.0, 3.0)
    ]
    assert sizes[0] < sizes[2]
    assert sizes == sorted(sizes)


def test_limits_of_length_and_repetition_hold():
    model = writer()
    with torch.no_grad():
        model.bias[END] = 6.0
        model.bias[7] = 4.0
    for decoding in ("greedy", "beam"):
        for one in write(model, document(), PredictSection(decoding=decoding, min_tokens=6, no_repeat_ngram=2), 12):
            assert 6 <= len(one.tokens) <= 12
            pairs = list(zip(one.tokens, one.tokens[1:]))
            assert len(pairs) == len(set(pairs))
        model.bias.data[END] = -20.0
        for one in write(model, document(), PredictSection(decoding=decoding, max_tokens=5), 12):
            assert len(one.tokens) == 5
            assert not one.ended
        model.bias.data[END] = 6.0


def test_decoding_tells_its_cost_and_linear_states_do_not_grow():
    sizes = {}
    for length in (8, 64):
        for kind in ("softmax", "linear"):
            speed = Speed()
            write(writer(cross=kind, decoder=kind), document((length,)), PredictSection(), 6, speed=speed)
            assert speed.steps > 0
            assert speed.ms_per_token > 0
            sizes[kind, length] = speed.state_bytes
    assert sizes["linear", 64] == sizes["linear", 8]
    assert sizes["softmax", 64] > 2 * sizes["softmax", 8]


@pytest.mark.parametrize("reader", ["tokens", "patches", "sentences"])
@pytest.mark.parametrize("variant", ["softmax", "window", "linear", "hybrid"])
def test_padding_changes_no_loss_and_no_gradient(reader, variant):
    model = writer(variant, reader=reader, patch=3)
    summary = torch.tensor([[BEGIN, 6, 7, END], [BEGIN, 9, END, PAD], [BEGIN, 8, END, PAD]])

    def read(rows):
        ids = document().ids[rows]
        ids = ids[:, : int((ids != PAD).sum(1).max())]
        if reader != "sentences":
            return Document(ids)
        # Sentences of two tokens.
        real = ids != PAD
        counts = (real.sum(1) + 1) // 2
        mask = torch.arange(int(counts.max())) < counts[:, None]
        starts = counts.cumsum(0) - counts
        owner = (torch.arange(ids.shape[1]) // 2)[None] + starts[:, None]
        return Document(ids, Words(ids[real], owner[real], mask))

    def gradient(rows):
        model.zero_grad()
        sizes = (summary[rows, 1:] != PAD).sum()
        (model.loss(read(rows), summary[rows]) * sizes).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    alone = sum(gradient([i]) for i in range(3))
    torch.testing.assert_close(gradient([0, 1, 2]), alone, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("reader", ["tokens", "patches"])
def test_documents_end_to_end_give_what_padded_ones_give(reader):
    model = writer("longformer", reader=reader, patch=3)
    summary = torch.tensor([[BEGIN, 6, 7, END], [BEGIN, 9, END, PAD], [BEGIN, 8, END, PAD]])
    text = document(marked=torch.arange(13)[None] == torch.tensor([[7], [2], [0]]))
    found, seen = [], []
    model.encoder.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[:2]))
    for model.packed in (False, True):
        model.zero_grad()
        loss = model.loss(text, summary)
        loss.backward()
        found.append((loss, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
    for padded, packed in zip(*found):
        torch.testing.assert_close(packed, padded, atol=2e-5, rtol=1e-4)
    real = 21 if reader == "tokens" else 5 + 3 + 1
    assert seen == [(3, 13 if reader == "tokens" else 5), (1, real)]


def test_global_tokens_change_the_output_and_receive_a_gradient():
    model = writer("longformer")
    marked = torch.zeros(1, 200, dtype=torch.bool)
    text = document((200,))
    plain = model.encode(text).vectors
    marked[0, 120] = True
    seen = model.encode(Document(text.ids, None, marked)).vectors
    assert (plain - seen).abs()[0, 190].max() > 1e-6, "a global token is seen from far away"
    model.encode(Document(text.ids, None, marked)).vectors[0, 199, 0].backward()
    assert model.table.weight.grad[text.ids[0, 120]].abs().sum() > 0


def test_the_pointer_can_write_what_the_vocabulary_would_not():
    model = writer(pointer=True)
    ids = document((6,)).ids
    summary = torch.tensor([[BEGIN, 6]])
    with torch.no_grad():
        model.point["gate"].bias.fill_(-50.0)  # copy always
        found, _ = model(Document(ids), summary)
    copied = found[0, -1].exp()
    assert float(copied[ids.unique()].sum()) == pytest.approx(1.0, abs=1e-4)
    absent = [t for t in range(5, VOCABULARY) if t not in ids[0].tolist()]
    assert copied[absent].max() < 1e-10


def test_smoothing_takes_a_share_from_the_right_token():
    text, summary = document((6,)), torch.tensor([[BEGIN, 6, END]])
    plain, smooth = writer(), writer(smoothing=0.2)
    log_p, _ = plain(text, summary[:, :-1])
    right = -log_p.gather(2, summary[:, 1:, None]).mean()
    every = -log_p[..., 1:].mean()
    torch.testing.assert_close(plain.loss(text, summary), right)
    torch.testing.assert_close(smooth.loss(text, summary), 0.8 * right + 0.2 * every)
