"""Hard attention: what it chooses, and that its estimators' mean gradient is the exact gradient."""

import copy
import itertools
import math

import pytest
import torch

from core.attention import Attention
from core.attention.blocked import hard as blocked
from core.attention.contract import Heads
from core.attention.registry import build
from core.attention.variants.hard import reinforce_loss

SEED = torch.tensor(5)


def inputs(*sizes, dtype=torch.float64):
    return [torch.randn(size, dtype=torch.float64).to(dtype).requires_grad_() for size in sizes]


@pytest.fixture
def small_blocks(monkeypatch):
    def blocks(q, k):
        for b, start in itertools.product(range(q.shape[0]), range(0, q.shape[2], 2)):
            yield slice(b, b + 1), start, min(q.shape[2], start + 2)

    monkeypatch.setattr(blocked, "_blocks", blocks)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [(2, 4, 2, 6, 6), (1, 2, 1, 3, 7), (1, 2, 2, 7, 3)])
def test_evaluation_takes_the_best_key(causal, shape, small_blocks):
    batch, heads, key_heads, length, keys = shape
    q, k, v = inputs((batch, heads, length, 4), (batch, key_heads, keys, 4), (batch, key_heads, keys, 3))
    mask = torch.rand(batch, keys) > 0.3
    got = build("hard", Heads(heads, key_heads, 4, 3)).eval()(q, k, v, causal=causal, key_mask=mask)
    assert got.log_mass is None
    for b, h, i in itertools.product(*map(range, (batch, heads, length))):
        g = h // (heads // key_heads)
        best, value = -math.inf, torch.zeros(3, dtype=torch.float64)
        for j in range(keys):
            if mask[b, j] and (not causal or j <= i + keys - length) and q[b, h, i].dot(k[b, g, j]) > best:
                best, value = q[b, h, i].dot(k[b, g, j]), v[b, g, j]
        assert torch.equal(got.out[b, h, i], value)


def test_of_equal_keys_it_takes_the_first():
    q, v = torch.ones(1, 1, 2, 3), torch.arange(5.0).view(1, 1, 5, 1)
    mask = torch.tensor([[False, False, True, True, True]])
    variant = build("hard", Heads(1, 1, 3, 1)).eval()
    assert variant(q, torch.ones(1, 1, 5, 3), v).out.flatten().tolist() == [0, 0]
    assert variant(q, torch.ones(1, 1, 5, 3), v, key_mask=mask).out.flatten().tolist() == [2, 2]


def test_training_draws_keys_as_often_as_softmax_says():
    draws = 20_000
    scores = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5])
    q, k = torch.ones(1, 1, draws, 1), scores.view(1, 1, 5, 1)
    _, chosen, log_prob, entropy = blocked.hard_forward(
        q, k, k, None, None, SEED, torch.ones(()), False, 1.0, False, True
    )
    p = scores.softmax(0)
    counts = torch.bincount(chosen.flatten(), minlength=5)
    # Pearson's statistic has 4 degrees of freedom: above 18.5 once in a thousand seeds
    assert ((counts - draws * p).square() / (draws * p)).sum() < 18.5
    torch.testing.assert_close(log_prob, p.log()[chosen])
    torch.testing.assert_close(entropy, -(p * p.log()).sum().expand_as(entropy))


def test_the_noise_is_gumbels_and_depends_on_seed_and_pair_only():
    noise = blocked.gumbel(SEED, torch.arange(200_000), torch.float64)
    assert abs(noise.mean() - 0.57721566) < 0.01
    assert abs(noise.var() - math.pi**2 / 6) < 0.02
    assert abs((noise[1:] * noise[:-1]).mean() - noise.mean() ** 2) < 0.01
    assert (
        abs((noise * blocked.gumbel(SEED + 1, torch.arange(200_000), torch.float64)).mean() - noise.mean() ** 2) < 0.01
    )
    assert torch.isfinite(blocked.gumbel(SEED, torch.arange(1 << 24), torch.float32)).all()


@pytest.mark.parametrize("estimator", ["gumbel", "reinforce"])
@pytest.mark.parametrize("causal", [False, True])
def test_training_equals_the_reference_and_its_blocks_do_not_matter(estimator, causal, small_blocks):
    variants = [build("hard", Heads(4, 2, 4, 3), estimator=estimator).double() for _ in range(2)]
    variants[1].load_state_dict(variants[0].state_dict())
    q, k, v = inputs((2, 4, 5, 4), (2, 2, 7, 4), (2, 2, 7, 3))
    mask = torch.tensor([[True, False, True, True, False, True, True], [False] * 7])
    for _ in range(3):
        results = []
        for variant, backend in zip(variants, ("torch", "reference")):
            out = variant(q, k, v, causal=causal, key_mask=mask, backend=backend).out
            total = out.sin().sum()
            if estimator == "reinforce":
                total = total + variant.loss(torch.tensor([1.5, -0.5]))
            results.append((out, *torch.autograd.grad(total, (q, k, v))))
        for mine, theirs in zip(*results):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)
            assert (mine[1] == 0).all()  # no visible key: no output, no gradient
    assert torch.equal(variants[0].draws, variants[1].draws)
    assert torch.equal(variants[0].baseline, variants[1].baseline)


def test_gradcheck_of_log_probabilities_and_entropy(small_blocks):
    q, k, v = inputs((1, 2, 4, 3), (1, 1, 5, 3), (1, 1, 5, 2))
    mask = torch.tensor([[True, True, False, True, True]])

    def measured(q, k):
        return blocked.hard_forward(q, k, v.detach(), mask, None, SEED, torch.ones(()), True, 0.5, False, True)[2:]

    assert torch.autograd.gradcheck(measured, (q, k), fast_mode=False)


def exact_gradient(reward, s):
    """d/ds of E[reward(choice)] over softmax(s), by enumeration."""
    s = s.detach().clone().requires_grad_()
    return torch.autograd.grad((s.softmax(-1) * reward).sum(), s)[0]


def test_reinforce_is_unbiased():
    # 40,000 copies of one query; its scores are the keys. The mean over copies estimates the exact gradient.
    copies = 40_000
    scores, reward = torch.tensor([0.3, -0.5, 1.0, 0.0]), torch.tensor([1.0, -2.0, 0.5, 3.0])
    q = torch.ones(copies, 1, 1, 1, dtype=torch.float64)
    s = scores.double().view(1, 1, 4, 1).expand(copies, 1, 4, 1).clone().requires_grad_()
    v = reward.double().view(1, 1, 4, 1).expand(copies, 1, 4, 1)
    variant = build("hard", Heads(1, 1, 1, 1), estimator="reinforce", entropy=0.0).double()
    variant.baseline.fill_(0.8)
    got = variant(q, s, v).out.flatten()
    each = torch.autograd.grad(variant.loss(got) * copies, s)[0].view(copies, 4)
    want, error = -exact_gradient(reward, scores), each.std(0) / math.sqrt(copies)
    assert (error > 0).all()
    assert ((each.mean(0) - want).abs() < 4 * error).all()
    assert (error < 0.05 * want.abs().max()).all()
    torch.testing.assert_close(variant.baseline, 0.9 * 0.8 + 0.1 * got.mean())


def test_straight_through_gumbel_has_the_gradient_of_its_relaxation_and_tends_to_the_exact_one():
    # Two keys: y = sigmoid((d + x) / tau) with x logistic, so the mean gradient is an integral that can be computed.
    copies, d = 200_000, 0.6
    q = torch.ones(1, 1, copies, 1, dtype=torch.float64)
    k = torch.tensor([d, 0.0], dtype=torch.float64).view(1, 1, 2, 1).requires_grad_()
    v = torch.tensor([1.0, -1.0], dtype=torch.float64).view(1, 1, 2, 1)
    found = {}
    for tau in (1.0, 0.1):
        variant = build("hard", Heads(1, 1, 1, 1), temperature=tau).double()
        found[tau] = float(torch.autograd.grad(variant(q, k, v).out.mean(), k)[0][0, 0, 0, 0])
        x = torch.linspace(-40, 40, 400_001, dtype=torch.float64)
        y, density = torch.sigmoid((d + x) / tau), torch.sigmoid(x) * torch.sigmoid(-x)
        relaxed = float(torch.trapezoid(2 * y * (1 - y) / tau * density, x))
        assert abs(found[tau] - relaxed) < 0.02 * relaxed
    exact = float(exact_gradient(torch.tensor([1.0, -1.0]), torch.tensor([d, 0.0]))[0])
    assert abs(found[0.1] - exact) < 0.03 * exact < abs(found[1.0] - exact)


def test_the_temperature_is_annealed_and_saved():
    attention = Attention(32, 4, "hard", temperature=2.0, final_temperature=0.5)
    taken = []
    for progress in (0.0, 0.5, 1.0):
        attention.variant.anneal(progress)
        taken.append(float(attention.variant.temperature))
    assert taken == pytest.approx([2.0, 1.0, 0.5])
    other = Attention(32, 4, "hard", temperature=2.0, final_temperature=0.5)
    other.load_state_dict(attention.state_dict())
    assert float(other.variant.temperature) == 0.5


def test_a_resumed_run_draws_what_an_uninterrupted_one_draws():
    attention = Attention(32, 4, "hard")
    x = torch.randn(1, 20, 32)
    attention(x)
    saved, global_state = copy.deepcopy(attention.state_dict()), torch.get_rng_state()
    first, second = attention(x), attention(x)
    assert not torch.equal(first, second)
    other = Attention(32, 4, "hard")
    other.load_state_dict(saved)
    assert torch.equal(other(x), first)
    assert torch.equal(other(x), second)
    torch.set_rng_state(global_state)
    attention.eval()
    assert torch.equal(attention(x), attention(x))
    assert torch.equal(torch.get_rng_state(), global_state)


@pytest.mark.parametrize("estimator", ["gumbel", "reinforce"])
def test_it_learns_to_find_the_marked_key(estimator):
    # The query must take the value of the one key whose first channel is 1.
    torch.manual_seed(0)
    variant = build("hard", Heads(1, 1, 4, 1), estimator=estimator)
    to_key = torch.nn.Linear(4, 4)
    query = torch.nn.Parameter(torch.randn(4))
    optimizer = torch.optim.Adam([query, *to_key.parameters()], lr=0.03)

    def batch():
        at, x = torch.randint(6, (64,)), torch.randn(64, 6, 4)
        x[:, :, 0] = (torch.arange(6) == at[:, None]).float()
        return x, (torch.arange(6) == at[:, None]).float().view(64, 1, 6, 1)

    def run(x, v):
        return variant(query.expand(len(x), 1, 1, 4), to_key(x).unsqueeze(1), v).out.flatten()

    for step in range(300):
        hit = run(*batch())
        loss = -hit.mean() if estimator == "gumbel" else reinforce_loss(variant, hit)
        if estimator == "gumbel":
            variant.anneal(step / 299)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    variant.eval()
    assert run(*batch()).mean() > 0.9  # chance is 1/6


def test_the_loss_wants_one_training_pass():
    attention = Attention(32, 4, "hard", estimator="reinforce")
    x = torch.randn(2, 5, 32)
    with pytest.raises(ValueError, match="there were 0"):
        reinforce_loss(attention, torch.zeros(2))
    attention(x)
    attention(x)
    with pytest.raises(ValueError, match="there were 2"):
        reinforce_loss(attention, torch.zeros(2))
    attention = copy.deepcopy(attention)
    attention(x)
    with pytest.raises(ValueError, match=r"reward must be \[2\]"):
        reinforce_loss(attention, torch.zeros(3))
    rows = torch.tensor([[True] * 5, [False] * 5])
    reinforce_loss(attention, torch.tensor([0.0, 1e6]), rows).backward()
    small = attention.query.weight.grad.abs().max()
    attention(x)
    reinforce_loss(attention, torch.tensor([0.0, 1e6])).backward()
    assert attention.query.weight.grad.abs().max() > 100 * small
    with pytest.raises(ValueError, match="no hard attention with estimator='reinforce'"):
        reinforce_loss(Attention(32, 4, "hard"), torch.zeros(2))


def test_training_compiles_whole():
    for estimator in ("gumbel", "reinforce"):
        torch.compiler.reset()
        attention = Attention(32, 4, "hard", estimator=estimator)
        twin = copy.deepcopy(attention)
        compiled = torch.compile(attention, fullgraph=True, dynamic=True, backend="aot_eager")
        for length in (12, 9):
            x = torch.randn(2, length, 32, requires_grad=True)
            results = []
            for one, model in ((compiled, attention), (twin, twin)):
                y = one(x)
                total = y.sum() if estimator == "gumbel" else y.sum() + reinforce_loss(model, torch.ones(2))
                results.append((y, *torch.autograd.grad(total, x)))
            for mine, theirs in zip(*results):
                torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_finite_at_large_scores(dtype):
    q, k, v = inputs((2, 2, 90, 16), (2, 1, 90, 16), (2, 1, 90, 8), dtype=dtype)
    variant = build("hard", Heads(2, 1, 16, 8), temperature=0.1)
    out = variant(q * 30, k * 30, v, causal=True).out
    gradients = torch.autograd.grad(out.float().square().sum(), (q, k, v))
    assert out.dtype == dtype
    assert all(torch.isfinite(x).all() for x in (out, *gradients))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "gumble"}, r"unknown estimator 'gumble' \(did you mean 'gumbel'\?\); known: gumbel, reinforce"),
        ({"estimator": "reinforce", "temperature": 1.0}, "temperature does not belong to estimator='reinforce'"),
        ({"entropy": 0.1}, "entropy does not belong to estimator='gumbel'"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"dropout": 0.1}, "cannot do 'dropout'"),
    ],
)
def test_bad_options_say_what_is_valid(options, message):
    with pytest.raises(ValueError, match=message):
        Attention(32, 4, "hard", **options)


def test_methods_of_the_other_estimator_are_refused():
    with pytest.raises(ValueError, match="only estimator='gumbel' has a temperature"):
        build("hard", Heads(1, 1, 1, 1), estimator="reinforce").anneal(0.5)
    with pytest.raises(ValueError, match="progress is the share"):
        build("hard", Heads(1, 1, 1, 1)).anneal(2)
    with pytest.raises(ValueError, match="has no loss of its own"):
        build("hard", Heads(1, 1, 1, 1)).loss(torch.zeros(1))
