"""Saturation mutagenesis: every substitution once, with the effect that asking the model about it would give."""

import pytest
import torch

from apps.genomics.alphabet import DNA
from apps.genomics.mutagenesis import draw_map, substitutions
from apps.genomics.recipe import PredictSection
from apps.genomics.records import Record
from apps.genomics.scoring import Window, batch_of, score_windows
from apps.genomics.variants import Variant

SETTINGS = PredictSection.model_validate({"batch_size": 7})


@pytest.fixture(scope="module")
def table(tmp_path_factory, letters):
    path = tmp_path_factory.mktemp("mutagenesis") / "x.csv"
    rows = [f"{text},{'ab'[n % 2]}" for n, text in enumerate(letters(60, 20))]
    path.write_text("sequence,label\n" + "\n".join(rows) + "\n")
    return path


@torch.no_grad()
@pytest.mark.parametrize("tokens", ["char", "kmer:3"])
def test_a_classifier_is_asked_about_each_changed_sequence(table, built, letters, tokens):
    _, _, task = built("classification", {"path": str(table), "tokens": tokens}, {"strand": "average"})
    text = letters(1, 20, seed=5)[0]
    text = text[:4] + "N" + text[5:]
    rows = list(substitutions(task, SETTINGS, Record("r", "x", text)))
    assert len(rows) == 3 * 19  # what N may be is not changed
    assert len({(row["position"], row["alt"]) for row in rows}) == len(rows)
    plain = task.predicted(batch_of(task, [DNA.encode(text, "x")]))[0]
    for row in (rows[0], rows[20], rows[-1]):
        at = row["position"] - 1
        assert text[at] == row["ref"]
        other = text[:at] + row["alt"] + text[at + 1 :]
        wanted = (task.predicted(batch_of(task, [DNA.encode(other, "x")]))[0] - plain).tolist()
        assert [row["difference_a"], row["difference_b"]] == pytest.approx(wanted, abs=1e-5)
        assert abs(wanted[0]) > 1e-5


@torch.no_grad()
@pytest.mark.parametrize("kind", ["causal", "masked"])
def test_a_language_model_scores_substitutions_as_it_scores_variants(table, built, letters, kind):
    _, _, task = built(kind, {"path": str(table)}, {"stem": [3]})
    text = letters(1, 15, seed=5)[0]
    rows = list(substitutions(task, SETTINGS, Record("r", "x", text)))
    for row in rows[::11]:
        variant = Variant("x", "x", "r", [(row["position"] - 1, row["ref"], row["alt"])], 0)
        score = score_windows(task, [Window(variant, text, 0)], flank=0)[0]
        assert row["llr"] == pytest.approx(score["llr"], abs=1e-5)
    longer = letters(1, 50, seed=6)[0]
    rows = list(substitutions(task, SETTINGS, Record("r", "x", longer), 30, 31))
    variant = Variant("x", "x", "r", [(30, rows[0]["ref"], rows[0]["alt"])], 0)
    score = score_windows(task, [Window(variant, longer[21:41], 21)], flank=0)[0]  # 20 letters, as in training
    assert rows[0]["llr"] == pytest.approx(score["llr"], abs=1e-5)


@torch.no_grad()
def test_positions_are_those_of_the_contig_and_of_the_parent(table, built, letters):
    _, _, task = built("classification", {"path": str(table)})
    text = letters(1, 20, seed=5)[0]
    rows = list(substitutions(task, SETTINGS, Record("r", "x", text, contig="chr2", start=100, strand="-")))
    assert (rows[0]["position"], rows[-1]["position"]) == (120, 101)
    assert (rows[0]["contig"], rows[0]["strand"]) == ("chr2", "-")
    assert Record("r", "x", "ACG", sites=[4, 9, 11]).position(1) == 9


def test_the_map_is_drawn(tmp_path):
    rows = [{"position": p, "ref": "A", "alt": a, "llr": p * 0.1} for p in range(1, 9) for a in "CGT"]
    path = draw_map(tmp_path / "m.png", Record("r", "x", "A" * 8), rows, "llr", "ACGT")
    assert path.read_bytes()[:4] == b"\x89PNG"
