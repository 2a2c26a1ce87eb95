"""What may be compared: the request is checked on resolved recipes before anything runs."""

import shlex
from dataclasses import replace

import pytest

from core.training import plan as planning
from core.training.command import main
from core.training.errors import UserError
from core.training.plan import make_plan


@pytest.fixture(autouse=True)
def _toy(toy):
    """Every test here knows the toy app."""


def request(**changes):
    return make_plan("toy/demo", **{"variants": ["softmax", "linear"], "seeds": 2, **changes})


def test_the_plan_holds_what_the_runs_share_and_where_they_differ():
    plan = request(variants=["softmax", "window:window=16"], seeds=[4, 7], overrides=["optim.lr=0.5"])
    assert plan.variants == {"softmax": {"variant": "softmax"}, "window:window=16": {"variant": "window", "window": 16}}
    assert (plan.seeds, plan.baseline, plan.metric, plan.better) == ((4, 7), "softmax", "mse", "lower")
    (config,) = plan.configs
    assert config["optim"]["lr"] == 0.5
    assert "attention" not in config
    assert "seed" not in config
    assert plan.command == (
        "longspan compare toy/demo optim.lr=0.5 --variants softmax,window:window=16 --seeds 4,7 "
        "--baseline softmax --jobs 1"
    )


def test_the_command_of_the_plan_asks_the_same_question(monkeypatch):
    asked = {}

    def compare(recipe, **request):
        asked.update(request)
        raise UserError("far enough")

    monkeypatch.setattr("core.training.compare.compare", compare)
    plan = request(overrides=["data.items=90"], grid=["data.width=4,8"], seeds=[4, 7], baseline="linear")
    main(shlex.split(plan.command)[1:])
    assert asked["seeds"] == [4, 7]
    main(shlex.split(request(seeds=[3]).command)[1:])
    assert asked["seeds"] == [3], "one seed, not three"
    main(shlex.split(plan.command)[1:])
    names = ("variants", "seeds", "overrides", "grid", "baseline", "jobs")
    again = make_plan("toy/demo", **{name: asked[name] for name in names})
    assert replace(again, environment=plan.environment) == plan  # the environment has the time of day


def test_a_grid_is_the_product_of_its_axes():
    plan = request(grid=["data.width=4,8", "optim.lr=1e-3,0.5"])
    assert plan.settings == (
        ("data.width=4", "optim.lr=1e-3"),
        ("data.width=4", "optim.lr=0.5"),
        ("data.width=8", "optim.lr=1e-3"),
        ("data.width=8", "optim.lr=0.5"),
    )
    assert [(c["data"]["width"], c["optim"]["lr"]) for c in plan.configs] == [(4, 1e-3), (4, 0.5), (8, 1e-3), (8, 0.5)]
    assert len(plan.planned()) == 4 * 2 * 2


def test_a_grid_is_read_as_recipes_are():
    plan = request(grid=["model.trap=no,12:30,010,'x,y'"])
    assert [config["model"]["trap"] for config in plan.configs] == ["no", "12:30", "010", "x,y"]
    assert plan.settings[0] == ("model.trap=no",)


def test_threads_are_shared_among_jobs(monkeypatch):
    monkeypatch.setattr(planning, "_cores", lambda: 16)
    assert request(jobs=3, overrides=["trainer.threads=2"]).threads == 2
    assert [request(jobs=jobs).threads for jobs in (1, 3, 32)] == [None, 5, 1]


def test_anything_but_the_attention_that_differs_is_refused(monkeypatch):
    real = planning.load_recipe

    def unfair(reference, overrides):
        return real(reference, [*overrides, "optim.lr=0.5"] if "attention=linear" in overrides else overrides)

    monkeypatch.setattr(planning, "load_recipe", unfair)
    with pytest.raises(UserError, match=r"linear and softmax differ in optim\.lr \(0\.5 and 0\.01\)"):
        request()


def test_a_layout_takes_part_like_a_variant_and_is_spelled_out():
    plan = request(variants=["softmax", "sandwich"], overrides=["backbone.depth=4"])
    assert plan.variants["sandwich"]["layout"] == "slls"
    assert plan.variants["sandwich"]["l"]["variant"] == "linear"
    with pytest.raises(UserError, match=r"'sandwich' does not mean the same layers in every setting \(ss and slls\)"):
        request(variants=["softmax", "sandwich"], grid=["backbone.depth=2,4"])
    assert request(variants=["softmax", "based"], grid=["backbone.depth=2,4"]).variants["based"]["layout"] == "lw"


def test_the_recipes_own_attention_may_take_part(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text(
        "app: toy\nattention: {s: softmax, l: linear}\nbackbone: {depth: 3, dim: 16, heads: 4, layout: lls}\n"
    )
    plan = make_plan(own, variants=["recipe", "softmax"], seeds=1)
    own = plan.variants["recipe"]
    assert (own["layout"], own["s"]["variant"], own["l"]["variant"]) == ("lls", "softmax", "linear")
    assert plan.variants["softmax"] == {"variant": "softmax"}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"variants": ["softmax", "linaer"]}, r"unknown attention 'linaer' \(did you mean 'linear'\?\)"),
        ({"variants": ["sandwhich"]}, r"unknown attention 'sandwhich' \(did you mean 'sandwich'\?\)"),
        ({"variants": ["based:window=3"]}, r"layout 'based' takes no options, got 'window'"),
        ({"variants": []}, "name the variants to compare"),
        ({"variants": ["softmax", "softmax"]}, "'softmax' is there twice"),
        ({"variants": ["window:window"]}, "must have the form name:option=value|must have the form name or"),
        ({"variants": ["window", "window:window=64"]}, "are the same attention here"),
        ({"variants": ["window:windw=8"]}, r"windw.*did you mean 'window'"),
        ({"variants": ["window:window=0"]}, "at least 1"),
        ({"baseline": "linaer"}, r"'linaer' takes no part \(did you mean 'linear'\?\)"),
        ({"seeds": 0}, "at least one"),
        ({"seeds": [1, 1]}, "seed is there twice"),
        ({"jobs": 0}, "jobs must be at least 1"),
        ({"overrides": ["attention=linear"]}, "say it in the variant"),
        ({"overrides": ["attention.window=8"]}, "say it in the variant"),
        ({"overrides": ["seed=3"]}, "--seeds"),
        ({"grid": ["seed=1,2"]}, "--seeds"),
        ({"grid": ["data.width"]}, "key=value,value"),
        ({"grid": ["optim.lr=1e-3,0.5,0.001"]}, r"optim\.lr=.*: 1e-3 and 0\.001 are the same value"),
        ({"grid": ["data.width=4", "data.width=8"]}, r"data\.width is there twice; give all its values at once"),
        ({"grid": ["data.wdth=1,2"]}, r"data\.wdth.*did you mean"),
        ({"overrides": ["optim.lr=fast"]}, r"optim\.lr"),
    ],
)
def test_mistakes_are_told_in_one_line(changes, says):
    with pytest.raises(UserError, match=says) as caught:
        request(**changes)
    assert len(str(caught.value).splitlines()) == 1
