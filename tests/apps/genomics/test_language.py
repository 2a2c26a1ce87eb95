"""Language models: no look ahead, one pass through the state equals the whole, perplexity is per base."""

import numpy as np
import pytest
import torch

from apps.genomics.alphabet import DNA
from apps.genomics.markov import Markov, contexts, count
from apps.genomics.neighbours import Neighbours
from apps.genomics.scoring import likelihood
from apps.genomics.stream import Stream, check_streams, stream_nats
from core.attention.registry import available, variant_class
from core.training.errors import UserError

CONSTANT = ("linear", "hybrid", "window", "gla", "delta", "gated_delta", "ssd", "retnet", "mlstm", "rwkv6", "kda")
CAUSAL = [name for name in available() if "causal" in variant_class(name).can and name != "auto"]


@pytest.fixture(scope="module")
def genome(tmp_path_factory, letters):
    path = tmp_path_factory.mktemp("language") / "g.fa"
    path.write_text(">chr1\n" + letters(1, 3000)[0] + "\n")
    return {"path": str(path), "split": "positions", "length": 64}


@pytest.fixture(scope="module")
def sequence(letters):
    return torch.from_numpy(DNA.encode(letters(1, 333, "ACGTACGTACGTN", 7)[0], "x").astype(np.int64))


@pytest.mark.parametrize("variant", CAUSAL)
def test_no_token_is_told_by_itself_or_by_the_future(genome, built, sequence, variant):
    model = {"stem": [4, 3], "shortcut": "markov:3"}
    _, _, task = built("causal", genome, model, [f"attention={variant}"])
    ids = sequence[None, :64]
    changed = ids.clone()
    changed[0, 40] = (ids[0, 40] + 1) % 4
    mask = torch.ones_like(ids, dtype=torch.bool)
    before, after = task.next_logits(ids, mask), task.next_logits(changed, mask)
    assert torch.allclose(before[:, :41], after[:, :41], atol=1e-5)
    assert not torch.allclose(before[:, 41:], after[:, 41:], atol=1e-3)


@pytest.mark.parametrize(
    ("variant", "chunk"), [*((name, 7) for name in CONSTANT), ("linear", 1), ("linear", 100), ("hybrid", 100)]
)
def test_one_pass_through_the_state_is_one_pass_over_the_whole(genome, built, sequence, variant, chunk):
    model = {"stem": [4, 3], "shortcut": "markov:5"}
    overrides = [f"attention={variant}"] + (["attention.window=8"] if variant in ("hybrid", "window") else [])
    _, _, task = built("causal", genome, model, overrides)
    with torch.no_grad():
        whole = -likelihood(task, sequence[None], torch.ones_like(sequence[None], dtype=torch.bool))[0]
        passed = stream_nats(task, sequence, chunk)
    assert torch.allclose(whole, passed, atol=2e-4), (whole - passed).abs().max()
    assert (passed[sequence >= 4] == 0).all()


def test_the_state_does_not_grow(genome, built):
    _, _, task = built("causal", genome, {"stem": [5], "shortcut": "markov:4"}, ["attention=linear"])
    stream = Stream(task)
    sizes = []
    with torch.no_grad():
        for _ in range(4):
            stream.feed(torch.randint(4, (500,)))
            sizes.append(stream.state_bytes + stream.tail.nbytes)
    assert len(set(sizes)) == 1


@pytest.mark.parametrize(
    ("task", "variant", "says"),
    [("causal", "softmax", "state of constant size, that of softmax"), ("masked", "linear", "of a causal model")],
)
def test_a_state_that_grows_is_refused(genome, built, task, variant, says):
    _, _, made = built(task, genome, None, [f"attention={variant}"])
    with pytest.raises(UserError, match=says):
        check_streams(made)


def test_contexts_count_back_and_stop_at_ambiguous_letters():
    ids, clean = contexts(DNA.encode("ACGNTA", "x"), 2, 4)
    assert clean.tolist() == [False, False, True, True, False, False]
    assert ids[2:4].tolist() == [0b0001, 0b0110]


def test_markov_counts_and_falls_back():
    codes = DNA.encode("AAACAAACAAAC", "x")
    assert count([codes], 1, DNA)[0].tolist() == [6, 3, 0, 0]
    model = Markov([codes], 3, DNA)
    scores = np.exp(model.score(DNA.encode("AAACN", "x")))
    assert scores[0] == pytest.approx((9 + 1) / (12 + 4))  # nothing before it: order 0
    assert scores[3] == pytest.approx((3 + 1) / (3 + 4))  # AAA is always followed by C
    assert scores[4] == 1.0  # not asked
    both = count([codes], 0, DNA, both_strands=True)[0]
    assert both.tolist() == [9, 3, 3, 9]


def test_the_markov_shortcut_starts_where_the_model_of_counts_stands(genome, built, sequence):
    _, data, task = built("causal", genome, {"shortcut": "markov:4"})
    with torch.no_grad():
        task.model.head.weight.zero_()
        task.model.head.bias.zero_()
        found = likelihood(task, sequence[None], torch.ones_like(sequence[None], dtype=torch.bool))[0]
    wanted = Markov(data.train.sequences, 4, DNA).score(sequence.numpy().astype(np.uint8))
    assert np.allclose(found.numpy(), wanted, atol=1e-5)


def test_a_masked_model_is_asked_the_share_that_the_recipe_says(genome, built):
    _, data, task = built("masked", {**genome, "length": None}, {"mask_share": 0.2})
    batch = data.train.__getitems__([0])
    torch.manual_seed(1)
    inputs, asked = task.corrupted(batch["ids"], batch["scored"])
    assert asked.float().mean() == pytest.approx(0.2, abs=0.03)
    changed = (inputs != batch["ids"]) & asked
    assert (inputs[~asked] == batch["ids"][~asked]).all()
    masked = (inputs == task.model.tokens.mask).sum() / asked.sum()
    assert masked == pytest.approx(0.8, abs=0.05)
    assert 0.8 < changed.sum() / asked.sum() < 0.95


def test_in_evaluation_what_is_asked_is_masked_and_nothing_else_is_changed(genome, built):
    _, data, task = built("masked", {**genome, "length": None}, {"mask_share": 0.3})
    batch, seen = data.test.__getitems__([0]), []
    task.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        task.eval_update(batch)
    changed = seen[0] != batch["ids"]
    assert (seen[0][changed] == task.model.tokens.mask).all()
    assert int(changed.sum()) == int(task.counts[0].sum()) > 50, "one that is left as it is would tell itself"


def test_neighbours_know_what_stands_between():
    codes = [DNA.encode("ACGACGACGACG" * 5, "x")]
    model = Neighbours(codes, 1, DNA)
    scores = np.exp(model.score(codes[0]))
    assert (scores[1:-1] > 0.8).all()
    assert scores[0] == pytest.approx(1 / 3, abs=0.02)


def test_a_shortcut_of_neighbours_starts_at_their_counts(genome, built):
    _, data, task = built("masked", genome, {"shortcut": "neighbours:2"})
    with torch.no_grad():
        task.model.head.weight.zero_()
        task.model.head.bias.zero_()
    codes = [one.astype(np.uint8) for one in data.train.sequences]
    letters, at, unknown = torch.tensor(codes[0][:60].astype(np.int64))[None], 30, task.model.tokens.mask
    real = torch.ones_like(letters, dtype=torch.bool)

    def answer(ids):
        with torch.no_grad():
            return task.model(ids, real)[0, at].log_softmax(-1)

    wanted = Neighbours(codes, 2, DNA)
    row = wanted.table[wanted.around(codes[0][:60])[0][at]]
    assert np.allclose(answer(letters).numpy(), row, atol=1e-5)
    hidden = letters.clone()
    hidden[0, at] = unknown
    assert torch.equal(answer(hidden), answer(letters)), "the letter itself is not looked at"
    # Beside a mask: the counts of all letters that it may hide, here the nearest on the right.
    hidden[0, at + 1] = unknown
    left, far = letters[0, at - 2 : at].tolist(), int(letters[0, at + 2])
    counts = wanted.counts[left[0], left[1], far].sum(0) + 1
    assert np.allclose(answer(hidden).exp().numpy(), counts / counts.sum(), atol=1e-5)


@pytest.mark.parametrize(
    ("task", "data", "shortcut", "message"),
    [("causal", {}, "neighbours:2", "does not go with"), ("masked", {}, "neighbours:9", "from 1 to 4")],
)
def test_a_shortcut_that_does_not_fit_the_task_is_refused(genome, recipe, task, data, shortcut, message):
    with pytest.raises((UserError, ValueError), match=message):
        recipe(task, genome | data, {"shortcut": shortcut})


@pytest.mark.parametrize("tokens", ["char", "kmer:3:3", "bpe:64"])
def test_perplexity_of_a_uniform_model_is_that_of_its_tokens_per_base(genome, built, tokens):
    _, data, task = built("causal", {**genome, "tokens": tokens, "length": 32})
    with torch.no_grad():
        task.model.head.weight.zero_()
        task.model.head.bias.zero_()
        task.eval_update(data.test.__getitems__(range(len(data.test))))
    found = task.eval_compute()
    sequence = data.test.sequences[0]
    bases = task.model.tokens.bases[sequence].sum()
    assert bases == 600
    nats = len(sequence) * np.log(task.model.tokens.targets) / bases
    assert found["nats_per_base"] == pytest.approx(nats, rel=1e-5)
    assert found["bits_per_base"] == pytest.approx(nats / np.log(2), rel=1e-5)
    assert found["perplexity"] == pytest.approx(np.exp(nats), rel=1e-5)
    # A uniform model is as much at a loss as there are tokens; of letters that is the perplexity per base.
    if tokens == "char":
        assert "perplexity_per_token" not in found
    else:
        assert found["perplexity_per_token"] == pytest.approx(task.model.tokens.targets, rel=1e-4)


def test_soft_masked_and_ambiguous_letters_are_not_asked(tmp_path, built, letters):
    text = letters(1, 400)[0]
    (tmp_path / "g.fa").write_text(">c\n" + text[:350] + "acgtacgtacNNNN" + text[350:] + "\n")
    data = {"path": str(tmp_path / "g.fa"), "split": "positions", "length": 100, "lower": "mask", "test_share": 0.3}
    _, found, task = built("causal", data)
    with torch.no_grad():
        task.eval_update(found.test.__getitems__(range(len(found.test))))
    assert task.counts[0].sum() == len(found.test.sequences[0]) - 14
