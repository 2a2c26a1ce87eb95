"""From recipe to items: labels of every kind, leaks, crops, and mistakes that are said in one line."""

import json

import numpy as np
import pytest

from apps.genomics.data import build_data
from apps.genomics.data_section import GeneratedSection
from apps.genomics.generated import FIRST, LEAST_GAP, SECOND, generate
from core.training.errors import UserError
from core.training.recipe import load_recipe


def table(path, rows, header="sequence,label"):
    path.write_text(header + "\n" + "\n".join(rows) + "\n")
    return str(path)


@pytest.fixture
def rows(letters):
    return [f"{text},{'ab'[n % 2]}" for n, text in enumerate(letters(40, 12))]


def test_files_for_each_part_and_validation_from_the_training_file(tmp_path, letters, rows, recipe):
    train = table(tmp_path / "train.csv", rows)
    test = table(tmp_path / "test.csv", [f"{text},a" for text in letters(6, 12, seed=9)])
    data = build_data(recipe("classification", {"train": train, "test": test, "val_share": 0.25}))
    assert [len(part) for part in (data.train, data.val, data.test)] == [30, 10, 6]
    assert data.spec["test_ids"] == [f"row{n}" for n in range(1, 7)]
    assert json.loads(json.dumps([data.spec, data.summary])) == [data.spec, data.summary]


def test_copies_warn_drop_or_refuse(tmp_path, rows, letters, recipe):
    train = table(tmp_path / "train.csv", rows)
    fresh = [f"{text},b" for text in letters(5, 12, seed=9)]
    test = table(tmp_path / "test.csv", [rows[0], rows[1], *fresh])
    sources = {"train": train, "test": test, "val_share": 0.05, "split_seed": 3}
    # Wherever the two rows are, in training or in validation, they have been seen.
    for seed in range(4):
        some = build_data(recipe("classification", {**sources, "val_share": 0.5, "split_seed": seed}))
        assert some.spec["copied"]["test"] == [0, 1]
    data = build_data(recipe("classification", sources))
    assert data.summary["leaks"]["test"]["exact"] == 2
    assert data.spec["copied"]["test"] == [0, 1]
    with pytest.raises(UserError, match=r"2 sequences of the test part have a copy .* first is .*test.csv, line 2"):
        build_data(recipe("classification", {**sources, "leaks": "refuse"}))
    assert build_data(recipe("classification", {**sources, "leaks": "off"})).summary["leaks"] == "not looked for"


def test_long_sequences_are_an_error_or_cropped_and_counted(tmp_path, letters, recipe):
    path = table(
        tmp_path / "x.csv", [f"{text},{'ab'[n % 2]}" for n, text in enumerate(letters(30, [10 + n for n in range(30)]))]
    )
    with pytest.raises(UserError, match=r"line \d+: 2\d tokens, data.length=20; give a larger length or say data.crop"):
        build_data(recipe("classification", {"path": path, "length": 20}))
    for crop in ("start", "centre", "end"):
        data = build_data(recipe("classification", {"path": path, "length": 20, "crop": crop}))
        assert max(data.train.lengths) == 20
        assert data.summary["cropped"].startswith("19 sequences, ")


@pytest.mark.parametrize("tokens", ["kmer:3", "kmer:3:3", "bpe:64"])
def test_a_crop_counts_tokens(tmp_path, letters, recipe, tokens):
    path = table(tmp_path / "x.csv", [f"{text},{'ab'[n % 2]}" for n, text in enumerate(letters(40, 50))])
    data = build_data(recipe("classification", {"path": path, "length": 9, "crop": "end", "tokens": tokens}))
    assert max(data.train.lengths) <= 9
    assert data.summary["cropped"].startswith("40 sequences, ")


@pytest.mark.parametrize(
    ("task", "rows", "says"),
    [
        ("classification", ["ACGT,"], "line 2: it has no label"),
        (
            "classification",
            [f"{'ACGT'[n % 4] * (n + 1)},a" for n in range(30)],
            "needs at least two classes, the training part has 'a'",
        ),
        ("classification", ["ACGX,a"], "line 2, position 4: 'X' is not a letter of dna"),
        ("regression", ["ACGT,high"], "line 2: the target must be a number, got 'high'"),
        ("regression", ["ACGT,nan"], "must be a finite number"),
        ("tokens", ["ACGT,HHE"], "line 2: 4 letters of sequence, 3 letters of labels"),
        ("token_regression", ["ACGT,1 2 3"], "4 letters of sequence, 3 numbers of labels"),
    ],
)
def test_labels_that_are_none_are_named(tmp_path, letters, recipe, task, rows, says):
    fill = {"regression": "1.5", "tokens": "H" * 11 + "E", "token_regression": " ".join(["1"] * 12)}.get(task)
    if len(rows) == 1:
        rows += [f"{text},{fill or 'ab'[n % 2]}" for n, text in enumerate(letters(30, 12))]
    with pytest.raises(UserError, match=says) as caught:
        build_data(recipe(task, {"path": table(tmp_path / "x.csv", rows)}))
    assert "\n" not in str(caught.value)


def test_a_label_of_the_test_part_that_training_has_not(tmp_path, rows, recipe):
    train = table(tmp_path / "train.csv", rows)
    test = table(tmp_path / "test.csv", ["ACGTACGTACGT,aa"])
    with pytest.raises(UserError, match=r"unknown label 'aa'.*known: a, b"):
        build_data(recipe("classification", {"train": train, "test": test}))


def test_several_labels_and_several_targets(tmp_path, letters, recipe):
    texts = letters(30, 10)
    path = table(tmp_path / "m.csv", [f"{text},{['x;y', 'y', '-'][n % 3]}" for n, text in enumerate(texts)])
    data = build_data(recipe("multilabel", {"path": path}))
    assert data.spec["names"] == ["x", "y"]
    assert {tuple(target) for target in data.train.targets} == {(1.0, 1.0), (0.0, 1.0), (0.0, 0.0)}
    path = table(tmp_path / "r.csv", [f"{text},{n},{-n}" for n, text in enumerate(texts)], "sequence,up,down")
    data = build_data(recipe("regression", {"path": path, "label": ["up", "down"]}))
    assert data.spec["names"] == ["up", "down"]
    assert data.spec["mean"][0] == -data.spec["mean"][1]


def test_a_mask_says_which_bases_count(tmp_path, letters, recipe):
    texts = letters(20, 15)
    (tmp_path / "x.fa").write_text("".join(f">s{n}\n{t}\n" for n, t in enumerate(texts)))
    splits = ["SET=train VALIDATION=False"] * 12 + ["SET=train VALIDATION=True"] * 4 + ["SET=test VALIDATION=False"] * 4
    (tmp_path / "l.fa").write_text("".join(f">s{n} {splits[n]}\n{'HEC' * 5}\n" for n in range(20)))
    (tmp_path / "m.fa").write_text("".join(f">s{n}\n{'1' * 10 + '0' * 5}\n" for n in range(20)))
    sources = {
        "path": str(tmp_path / "x.fa"),
        "labels_path": str(tmp_path / "l.fa"),
        "labels_header": r"SET=(?P<split>\w+) VALIDATION=(?P<val>\w+)",
        "mask_path": str(tmp_path / "m.fa"),
        "split": "given",
    }
    data = build_data(recipe("tokens", sources))
    assert [len(part) for part in (data.train, data.val, data.test)] == [12, 4, 4]
    target = data.test.__getitems__([0])["target"][0]
    assert (target[10:] == -1).all()
    assert target[:3].tolist() == [data.spec["names"].index(letter) for letter in "HEC"]
    (tmp_path / "m.fa").write_text(">s0\n111\n")
    with pytest.raises(UserError, match=r"record 1 's0'.*needs one 0 or 1 per letter for this id, 15 in all"):
        build_data(recipe("tokens", sources))


def test_soft_masked_bases_of_a_task_per_base_do_not_count(tmp_path, letters, recipe):
    texts = [text[:5].lower() + text[5:] for text in letters(30, 15)]
    (tmp_path / "x.fa").write_text("".join(f">s{n}\n{t}\n" for n, t in enumerate(texts)))
    (tmp_path / "l.fa").write_text("".join(f">s{n}\n{'HEC' * 5}\n" for n in range(30)))
    sources = {"path": str(tmp_path / "x.fa"), "labels_path": str(tmp_path / "l.fa"), "lower": "mask"}
    target = build_data(recipe("tokens", sources)).test.__getitems__([0])["target"][0]
    assert (target[:5] == -1).all()
    assert (target[5:] >= 0).all()


def test_numbers_per_base_are_cut_with_their_bases(tmp_path, letters, recipe):
    rows = [f"{text},{' '.join(str(n) for n in range(30))}" for text in letters(3, 30)]
    path = table(tmp_path / "x.csv", rows)
    data = build_data(recipe("token_regression", {"path": path, "split": "positions", "test_share": 0.2}))
    assert data.test.targets[0].tolist() == list(range(24, 30))


def test_a_pretrained_run_brings_its_tokens_and_its_weights(tmp_path, letters, recipe, rows):
    import torch

    from core.training.fit import fit
    from core.training.run import load_run

    (tmp_path / "g.fa").write_text(">c\n" + letters(1, 2000)[0] + "\n")
    before = recipe("masked", {"path": str(tmp_path / "g.fa"), "split": "positions", "length": 64, "tokens": "bpe:64"})
    fit(before, run_dir=tmp_path / "before", quiet=True, floors=False)
    path = table(tmp_path / "x.csv", rows)
    model = {"pretrained": str(tmp_path / "before")}
    with pytest.raises(UserError, match=r"reads dna as bpe:64; say data.alphabet=dna data.tokens=bpe:64"):
        build_data(recipe("classification", {"path": path}, model))
    after = recipe("classification", {"path": path, "tokens": "bpe:64"}, model, ["optim.lr=1e-9"])
    fit(after, run_dir=tmp_path / "after", quiet=True, floors=False)
    old, new = (load_run(tmp_path / name).task.model for name in ("before", "after"))
    assert torch.allclose(old.embed.weight, new.embed.weight, atol=1e-5)
    assert old.head.weight.shape != new.head.weight.shape
    assert "weights taken over" in (tmp_path / "after" / "log.txt").read_text()


def test_generated_sequences_hold_both_motifs_apart_and_both_classes_alike():
    records = generate(GeneratedSection(sequences=300, length=60, noise=0.0))
    for record in records:
        first, second = record.sequence.find(FIRST), record.sequence.find(SECOND)
        assert min(first, second) >= 0
        assert abs(first - second) >= len(FIRST) + LEAST_GAP
        assert record.label == ("A before B" if first < second else "B before A")
    assert 0.4 < np.mean([record.label == "A before B" for record in records]) < 0.6
    flipped = generate(GeneratedSection(sequences=300, length=60, noise=0.2))
    wrong = [
        r.label != ("A before B" if r.sequence.find(FIRST) < r.sequence.find(SECOND) else "B before A") for r in flipped
    ]
    assert 0.1 < np.mean(wrong) < 0.3


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("task=clasification", "task must be"),
        ("metric=accurracy", r"metric 'accurracy' does not go with task=classification \(did you mean 'accuracy'\?\)"),
        ("data.tokens=kmers", "tokens must be char"),
        ("data.path=x.fa", "data.generated and data.path both say where"),
        ("data.val=x.fa", "go with data.train"),
        ("data.header=abc", "no named group"),
        ("data.header=(?P<lable>x)", r"the group 'lable' \(did you mean 'label'\?\)"),
        ("data.overlap=5", "overlap belongs to stretches of data.length"),
        ("data.fold=12", "below folds=10"),
        ("data.test_share=0.95", "must leave a training part"),
        ("data.sites=[3,2]", "count from 1 and rise"),
        ("model.shortcut=window:5", "model.shortcut=window:5 does not go with task=classification"),
        ("model.shortcut=kmer", "shortcut kmer has a size"),
        ("model.shortcut_frozen=true", "model.shortcut is none"),
        ("model.stem=[1]", "stem widths are 2 to 65"),
        ("data.negatives=genome", "needs data.negatives_from"),
        ("data.features=[CDS]", "labels per base: say task=tokens"),
    ],
)
def test_a_recipe_that_contradicts_itself_is_refused(override, says):
    with pytest.raises(UserError, match=says):
        load_recipe("genomics/demo", [override])


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["task=causal", "model.strand=tied"], "let a causal model read the future"),
        (["task=causal", "data.tokens=kmer:4"], "say kmer:4:4"),
        (["task=tokens", "data.tokens=kmer:4"], "needs data.tokens=char"),
        (["data.alphabet=protein", "model.strand=tied"], "a protein has no second strand"),
        (["model.shortcut=kmer:3", "data.tokens=bpe:100"], "reads letters and needs data.tokens=char"),
        (["model.hidden_share=0.1", "data.tokens=bpe:100"], "hides letters: it needs data.tokens=char"),
        (["task=masked", "data.tokens=bpe:100", "model.strand=average"], "needs data.tokens=char"),
        (["task=causal", "model.strand=average"], "a causal model reads one strand at a time; say augment"),
        (["data.mask_path=m.fa"], "data.mask_path leaves single bases unscored"),
        (["data.lower=mask"], "needs an answer per base or a language model"),
        (["task=causal", "data.lower=mask", "data.tokens=bpe:100"], "data.tokens=char; here are task=causal and bpe"),
        (["data.alphabet=protein", "data.min_quality=20"], "min_quality reads bases as N, which is an amino acid"),
    ],
)
def test_options_that_exclude_each_other(overrides, says):
    with pytest.raises(UserError, match=says):
        load_recipe("genomics/demo", overrides)
