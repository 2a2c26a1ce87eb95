"""The optimiser's parts: what decays, how the rate moves, what the running mean is."""

import math

import pytest
import torch
from torch import nn

from core.training.optim import WeightAverage, build_optimizer, build_scheduler, lr_factor, parameter_groups
from core.training.sections import OptimSection


def test_norms_biases_and_vectors_do_not_decay():
    model = nn.ModuleDict({"linear": nn.Linear(4, 3), "norm": nn.LayerNorm(3), "frozen": nn.Linear(2, 2)})
    model.gate = nn.Parameter(torch.zeros(5))
    model.table = nn.Parameter(torch.zeros(1, 7, 3))
    model["frozen"].requires_grad_(False)
    decayed, plain = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert {id(p) for p in decayed["params"]} == {id(model["linear"].weight), id(model.table)}
    expected = [model["linear"].bias, model["norm"].weight, model["norm"].bias, model.gate]
    assert {id(p) for p in plain["params"]} == {id(p) for p in expected}


def test_a_decayed_weight_shrinks_and_a_bias_does_not():
    model = nn.Linear(3, 2)
    weight, bias = model.weight.detach().clone(), model.bias.detach().clone()
    optimizer = build_optimizer(model, OptimSection(lr=0.1, weight_decay=0.5), fused=True)
    model.weight.grad, model.bias.grad = torch.zeros_like(weight), torch.zeros_like(bias)
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), weight * (1 - 0.1 * 0.5))
    assert torch.equal(model.bias.detach(), bias)


@pytest.mark.parametrize(("warmup", "steps"), [(0.1, 10), (10, 10), (0.0, 0)])
def test_warm_up_then_cosine(warmup, steps):
    section = OptimSection(lr=1.0, warmup=warmup, min_lr_ratio=0.1)
    factors = [lr_factor(step, 100, section) for step in range(101)]
    assert factors[:steps] == pytest.approx([(step + 1) / (steps + 1) for step in range(steps)])
    assert factors[steps] == 1
    assert factors[100] == pytest.approx(0.1)
    half = (100 - steps) // 2
    assert factors[steps + half] == pytest.approx(0.55)
    assert all(a > b for a, b in zip(factors[steps:], factors[steps + 1 :]))
    assert lr_factor(1000, 100, section) == pytest.approx(0.1), "a run that goes on keeps the end value"


def test_the_schedule_agrees_with_torch():
    """Without warm-up it is CosineAnnealingLR."""
    section = OptimSection(lr=0.3, warmup=0, min_lr_ratio=0.2)
    ours = build_optimizer(nn.Linear(2, 2), section, fused=False)
    theirs = build_optimizer(nn.Linear(2, 2), section, fused=False)
    a = build_scheduler(ours, section, 20)
    b = torch.optim.lr_scheduler.CosineAnnealingLR(theirs, 20, eta_min=0.06)
    for _ in range(20):
        assert ours.param_groups[0]["lr"] == pytest.approx(theirs.param_groups[0]["lr"])
        for optimizer, scheduler in ((ours, a), (theirs, b)):
            optimizer.step()
            scheduler.step()


def test_constant_schedule():
    section = OptimSection(warmup=3, schedule="constant")
    assert [lr_factor(step, 10, section) for step in range(5)] == [0.25, 0.5, 0.75, 1, 1]


def test_the_running_mean_is_the_formula_and_gives_the_weights_back():
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    average = WeightAverage(model, 0.9)
    mean = model.weight.detach().double().clone()
    for update in range(1, 201):
        with torch.no_grad():
            model.weight.add_(torch.randn_like(model.weight))
        average.update()
        decay = min(0.9, (1 + update) / (10 + update))
        mean = decay * mean + (1 - decay) * model.weight.detach().double()
    before, storage = model.weight.detach().clone(), model.weight.data_ptr()
    with average.applied():
        torch.testing.assert_close(model.weight.detach().double(), mean, rtol=1e-5, atol=1e-6)
    assert torch.equal(model.weight.detach(), before)
    with pytest.raises(ZeroDivisionError), average.applied():
        1 / 0  # noqa: B018
    assert torch.equal(model.weight.detach(), before)
    assert model.weight.data_ptr() == storage
    other = WeightAverage(nn.Linear(4, 2), 0.9)
    other.load_state_dict(average.state_dict())
    assert other.updates == 200
    torch.testing.assert_close(other.state_dict()["mean"]["weight"].double(), mean, rtol=1e-5, atol=1e-6)
    assert not math.isclose(float(mean.sum()), float(before.sum()), rel_tol=1e-3)
