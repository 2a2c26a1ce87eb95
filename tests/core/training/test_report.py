"""The pages, made from the synthetic leftovers of a comparison: complete, self-contained, and safe to open."""

import csv
import html
import json
import math
import re
import subprocess
import sys
from base64 import b64decode
from dataclasses import replace
from io import StringIO
from pathlib import Path
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure
from rich.console import Console

from core.training.errors import UserError
from core.training.ledger import Plan, Run, append_run, write_plan
from core.training.plots import STYLE, WIDTH, _legend
from core.training.report import load_summary, report
from core.training.tables import print_comparison

TIME = {"softmax": 1.0, "window": 0.8, "linear": 0.48, "hybrid": 0.95}
LEVEL = {"softmax": 0.392, "window": 0.381, "linear": 0.3825, "hybrid": 0.3808}
STATE = {"softmax": 344064, "window": 65536, "linear": 18432, "hybrid": 84000}
NAN = "loss is nan at epoch 2, step 310; gradient norm <4.1e+03> & rising"


def write_comparison(
    folder: Path, *, variants=tuple(TIME), seeds=5, jobs=1, nan=(), floor=0.4, settings=((),), epochs=10
) -> Plan:
    """What compare leaves in a folder, from made-up runs: noise that seeds share, and noise of their own."""
    plan = Plan(
        recipe="timeseries/etth1",
        app="timeseries",
        metric="mse",
        better="lower",
        variants={v: {"variant": v, **({"window": 64} if v in ("window", "hybrid") else {})} for v in variants},
        seeds=tuple(range(seeds)),
        settings=settings,
        baseline=variants[0],
        jobs=jobs,
        threads=None if jobs == 1 else 2,
        command=f"longspan compare timeseries/etth1 --variants {','.join(variants)} --seeds {seeds}",
        configs=tuple({"app": "timeseries", "trainer": {"epochs": epochs}} for _ in settings),
        environment={"longspan": "0.1.0", "python": "3.11.7"},
    )
    folder.mkdir(exist_ok=True)
    write_plan(folder, plan)
    for setting, variant, seed in plan.planned():
        run_dir = "/".join([*setting, variant, f"seed-{seed}"])
        (folder / run_dir).mkdir(parents=True)
        draws = np.random.default_rng([seed, list(TIME).index(variant)])
        shared = float(np.random.default_rng(seed).normal(scale=0.002))
        mse = LEVEL[variant] + shared + float(draws.normal(scale=0.0012)) + 0.06 * settings.index(setting)
        lines = ["step,epoch,train_loss,val_mse,lr,tokens_per_s,step_ms,peak_bytes"]
        for epoch in range(1, epochs + (1 if seed else -1)):
            fall = math.exp(-epoch / (1.0 if variant == "linear" else 1.5))
            train, val = 0.35 + 0.5 * fall + draws.normal(scale=0.004), mse + 0.25 + fall + draws.normal(scale=0.004)
            lines.append(f"{epoch * 250},{epoch},{train:.5f},{val:.5f},1e-3,,,")
        (folder / run_dir / "metrics.csv").write_text("\n".join(lines) + "\n")
        (folder / run_dir / "environment.json").write_text(
            json.dumps({"command": ["/somewhere/fit"], "processor": "Some CPU", "threads": 2, "commit": None})
        )
        bad = (variant, seed) in nan
        good = {
            "val": {"mse": mse + 0.25, "mae": mse + 0.3},
            "test": {"mse": mse, "mae": mse + 0.02, "mse_original": 12.3 * mse},
            "floors": {
                "last value": {"mse": 1.294, "mae": 0.713},
                "seasonal naive": {"mse": 0.512},
                "ridge": {"mse": floor},
            },
        }
        cost = {
            "parameters": 118_432,
            "flops_per_item": 3.1e6 * TIME[variant],
            "state_bytes": STATE[variant],
            "tokens_per_s": 95_000 / TIME[variant],
            "step_ms": 41.3 * TIME[variant] + float(draws.normal(scale=0.3)),
            "peak_bytes": 412e6 * (0.6 + 0.4 * TIME[variant]),
            "seconds": 312 * TIME[variant],
        }
        run = Run(
            variant=variant,
            seed=seed,
            overrides=(*setting, f"attention={variant}", f"seed={seed}"),
            status="nan" if bad else "ok",
            error=NAN if bad else None,
            metrics={} if bad else good,
            cost={} if bad else cost,
            seconds=320 * TIME[variant],
            run_dir=run_dir,
            setting=setting,
        )
        append_run(folder, run)
    return plan


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A comparison with two NaN runs, made with two jobs, and its report."""
    folder = tmp_path_factory.mktemp("finished")
    write_comparison(folder, nan=(("linear", 1), ("linear", 3)), jobs=2)
    report(folder)
    return folder


def plain(page: str) -> str:
    """The words of a page."""
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page.split("</style>", 1)[1])))


def test_the_page_needs_nothing_from_elsewhere(finished):
    page = (finished / "report.html").read_text()
    # Names of XML vocabularies look like addresses but are never fetched.
    addresses = re.findall(r"""(?:src|href|url|@import)\s*[=(]?\s*["']?([^"'\s)>]+)""", page)
    outside = [a for a in addresses if not a.startswith("#") and not re.fullmatch(r"[\w-]+:?", a)]
    assert [a for a in outside if "//" in a or a.endswith((".js", ".css", ".svg", ".png"))] == []
    assert "<script" not in page
    assert len(re.findall("<svg", page)) == 3


def test_plots_are_well_formed_and_name_every_variant(finished):
    files = sorted((finished / "plots").glob("*.svg"))
    assert [path.stem for path in files] == ["costs", "curves", "differences"]
    for path in files:
        texts = {element.text for element in ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")}
        assert set(TIME) <= texts, path.name


def test_the_page_opens_with_the_answer_and_warns(finished):
    page = plain((finished / "report.html").read_text())
    summary = json.loads((finished / "summary.json").read_text())
    answer = summary["tables"][0]["headline"]
    assert answer.startswith("Use hybrid here: mse 0.3813 ± 0.0016 over 5 seeds, better than softmax;")
    assert page.index(answer) < page.index("Quality") < page.index("Cost")
    assert "2 runs shared this machine" in page
    assert "linear: 2 of 5 runs failed or went NaN" in page


def test_failures_are_shown_with_their_reason_and_cannot_inject_markup(finished):
    page = (finished / "report.html").read_text()
    assert "linear/seed-1" in page
    assert "gradient norm &lt;4.1e+03&gt; &amp; rising" in page
    assert NAN in (finished / "report.md").read_text()


def test_the_page_says_how_it_was_run(finished):
    page = plain((finished / "report.html").read_text())
    for words in (
        "longspan compare timeseries/etth1 --variants",
        "Some CPU",
        "python 3.11.7",
        "{variant: window, window: 64}",
    ):
        assert words in page
    assert "/somewhere" not in page  # a run's own command carries local paths


def test_csv_json_and_both_pages_tell_the_same(finished):
    rows = list(csv.DictReader((finished / "summary.csv").read_text().splitlines()))
    (table,) = json.loads((finished / "summary.json").read_text())["tables"]
    assert [row["variant"] for row in rows] == list(TIME)
    for row, told in zip(rows, table["rows"]):
        assert float(row["mean"]) == told["metric"]["mean"] == pytest.approx(np.mean(list(told["values"].values())))
        shown = f"{told['metric']['mean']:.4f} ± {told['metric']['sd']:.4f}"
        assert shown in (finished / "report.html").read_text()
        assert shown in (finished / "report.md").read_text()
    assert [row["verdict"] for row in rows] == ["baseline", "better", "better", "better"]
    assert {row["floor"] for row in rows} == {"ridge"}
    assert rows[2]["failed"] == "2"
    assert float(rows[1]["step_ms"]) < float(rows[0]["step_ms"])


def test_a_report_made_again_is_the_same(finished):
    first = {path: path.read_bytes() for path in report(finished)}
    assert {path: path.read_bytes() for path in report(finished)} == first


def test_a_grid_gives_a_table_per_setting(tmp_path):
    write_comparison(
        tmp_path, variants=("softmax", "linear"), seeds=3, settings=(("data.horizon=96",), ("data.horizon=720",))
    )
    report(tmp_path)
    page = plain((tmp_path / "report.html").read_text())
    assert "The first place by mse is linear's in all 2 settings" in page
    assert page.count("Learning curves") == 2
    assert (tmp_path / "plots" / "data.horizon=720-curves.svg").is_file()
    text = (tmp_path / "report.md").read_text()
    assert text.index("## data.horizon=96") < text.index("## data.horizon=720")


@pytest.mark.parametrize("seeds", [1, 2])
def test_few_seeds_and_short_runs_still_make_a_page(tmp_path, seeds):
    write_comparison(tmp_path, variants=("softmax", "linear"), seeds=seeds, epochs=2)
    files = report(tmp_path)
    assert {path.name for path in files} >= {"report.html", "report.md", "summary.csv", "summary.json", "costs.svg"}
    assert "Fewer than three seeds" in (tmp_path / "report.md").read_text()


def test_a_comparison_without_a_finished_run_shows_its_failures(tmp_path):
    write_comparison(tmp_path, variants=("softmax", "linear"), seeds=1, nan=(("softmax", 0), ("linear", 0)))
    report(tmp_path)
    page = plain((tmp_path / "report.html").read_text())
    assert "No run has finished" in page
    assert not list((tmp_path).glob("plots/*"))


def test_the_console_says_it_too(finished):
    terminal = Console(width=140, record=True, file=StringIO(), force_terminal=True)
    print_comparison(load_summary(finished), finished, terminal)
    text = " ".join(terminal.export_text().split())
    assert f"✗ linear/seed-3: {NAN}" in text
    assert "Use hybrid here: mse 0.3813 ± 0.0016 over 5 seeds, better than softmax" in text
    assert text.endswith(f"are not separable from it. {finished}/report.html")


def test_a_script_gets_two_lines(finished, capsys):
    print_comparison(load_summary(finished), finished)
    answer, page = capsys.readouterr().out.splitlines()
    assert answer.startswith("Use hybrid here")
    assert Path(page) == finished / "report.html"


def test_what_is_no_comparison_is_said(tmp_path):
    with pytest.raises(UserError, match="holds no comparison"):
        report(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        report(tmp_path / "nowhere")


def test_a_report_needs_no_torch(finished):
    code = (
        "import sys; from core.training.report import report; report(sys.argv[1]); "
        "import core.training.compare; sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(finished)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_pictures_that_runs_leave_stand_on_the_page_one_per_variant(tmp_path, monkeypatch):
    from core.training import report as pages
    from core.training.app import Sheet, get_app

    write_comparison(tmp_path / "c", variants=("softmax", "linear", "window"), seeds=2)
    for variant, seed in (("window", 0), ("softmax", 1), ("softmax", 0)):
        (tmp_path / "c" / variant / f"seed-{seed}" / "look.png").write_bytes(f"{variant} {seed}".encode())
    app = replace(get_app("timeseries"), sheet=Sheet("look.png", "A look inside", "Left & right."))
    monkeypatch.setattr(pages, "apps", lambda: {"timeseries": app})
    report(tmp_path / "c")
    page = (tmp_path / "c" / "report.html").read_text()
    found = re.findall(r'<img src="data:image/png;base64,([^"]+)" alt="A look inside: (\w+)"', page)
    # In the order of the variants, the first seed that left one.
    assert [(b64decode(content), label) for content, label in found] == [
        (b"softmax 0", "softmax"),
        (b"window 0", "window"),
    ]
    assert "Left &amp; right. The files are look.png in the folders of the runs." in page
    assert "![softmax, seed 0](softmax/seed-0/look.png)" in (tmp_path / "c" / "report.md").read_text()
    monkeypatch.setattr(pages, "apps", dict)  # a machine without the app
    report(tmp_path / "c")
    assert "<img" not in (tmp_path / "c" / "report.html").read_text()


def test_legends_fit_the_page_however_long_the_names(tmp_path):
    names = [f"linear:feature_map=focused:conv={n}" for n in range(9)]
    plan = replace(write_comparison(tmp_path / "c"), variants={name: {} for name in names})
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3), layout="constrained")
        _legend(figure, plan, names, lines=True)
        figure.canvas.draw()
    box = figure.legends[0].get_window_extent()
    assert box.x1 <= figure.bbox.x1
