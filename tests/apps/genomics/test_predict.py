"""`predict`: from a user's file and a run alone to files that other programs read, in the user's coordinates."""

import csv
import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from core.training.errors import UserError
from core.training.fit import fit
from core.training.predict import inspect, predict


def table(path):
    with path.open() as file:
        return list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))


@pytest.fixture(scope="module")
def fasta(tmp_path_factory, letters):
    path = tmp_path_factory.mktemp("input") / "q.fa"
    path.write_text("".join(f">q{n} words\n{text}\n" for n, text in enumerate(letters(4, [30, 31, 20, 41], seed=5))))
    return path


@pytest.fixture(scope="module")
def classifier(tmp_path_factory, letters, recipe):
    folder = tmp_path_factory.mktemp("classifier")
    texts = letters(60, [24 + n % 5 for n in range(60)])
    rows = [f"{text},{['no', 'yes'][n % 2]}" for n, text in enumerate(texts)]
    (folder / "x.csv").write_text("sequence,label\n" + "\n".join(rows) + "\n")
    run = fit(recipe("classification", {"path": str(folder / "x.csv")}), run_dir=folder / "run", quiet=True).run_dir
    (folder / "x.csv").unlink()  # predict needs the run folder alone
    return run


@pytest.fixture(scope="module")
def annotator(tmp_path_factory, letters, recipe):
    """A run whose window model knows that the label is the letter."""
    folder = tmp_path_factory.mktemp("annotator")
    texts = letters(40, 80)
    (folder / "x.fa").write_text("".join(f">s{n}\n{text}\n" for n, text in enumerate(texts)))
    labels = [text.translate(str.maketrans("ACGT", "XYYZ")) for text in texts]
    (folder / "l.fa").write_text("".join(f">s{n}\n{text}\n" for n, text in enumerate(labels)))
    data = {"path": str(folder / "x.fa"), "labels_path": str(folder / "l.fa"), "length": 16, "overlap": 8}
    made = recipe("tokens", data, {"shortcut": "window:3"}, ["optim.lr=1e-6"])
    return fit(made, run_dir=folder / "run", quiet=True).run_dir


@pytest.fixture(scope="module")
def reader(tmp_path_factory, letters, recipe):
    """A causal model with a state of constant size."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "g.fa").write_text(">chr1\n" + letters(1, 1200)[0] + "\n")
    data = {"path": str(folder / "g.fa"), "split": "positions", "length": 64, "overlap": 32}
    made = recipe("causal", data, {"shortcut": "markov:2", "stem": [4]}, ["attention=linear"])
    return fit(made, run_dir=folder / "run", quiet=True).run_dir, folder / "g.fa"


def test_a_row_per_sequence_with_its_id(classifier, fasta, tmp_path):
    rows = table(predict(classifier, fasta, tmp_path / "p.tsv")[0])
    assert [row["id"] for row in rows] == ["q0", "q1", "q2", "q3"]
    for row in rows:
        assert float(row["p_no"]) + float(row["p_yes"]) == pytest.approx(1, abs=1e-5)
        assert row["predicted"] == ("yes" if float(row["p_yes"]) > 0.5 else "no")
    one = tmp_path / "one.fa"
    one.write_text(fasta.read_text().split(">")[3].join([">", ""]))
    alone = table(predict(classifier, one, tmp_path / "one.csv")[0])
    assert float(alone[0]["p_yes"]) == pytest.approx(float(rows[2]["p_yes"]), abs=1e-5), (
        "the batch changed a prediction"
    )


def test_intervals_keep_their_coordinates(classifier, fasta, tmp_path):
    (tmp_path / "x.bed").write_text("q3\t5\t35\tpeak\t0\t-\n")
    rows = table(predict(classifier, tmp_path / "x.bed", tmp_path / "p.csv", [f"predict.reference={fasta}"])[0])
    assert [(r["contig"], r["start"], r["end"], r["strand"]) for r in rows] == [("q3", "5", "35", "-")]
    over = [f"predict.reference={fasta}"]
    predict(classifier, tmp_path / "x.bed", tmp_path / "p.parquet", over)
    predict(classifier, tmp_path / "x.bed", tmp_path / "e.parquet", [*over, "predict.what=embeddings"])
    predict(classifier, tmp_path / "x.bed", tmp_path / "e.npz", [*over, "predict.what=embeddings"])
    predict(classifier, tmp_path / "x.bed", tmp_path / "m.parquet", [*over, "predict.what=mutagenesis"])
    place = {"contig": "q3", "start": 5, "end": 35, "strand": "-"}
    for name in ("p.parquet", "e.parquet"):
        row = pq.read_table(tmp_path / name).to_pylist()[0]
        assert {key: row[key] for key in place} == place
    assert {key: np.load(tmp_path / "e.npz")[key].item() for key in place} == place
    assert pq.read_table(tmp_path / "m.parquet").to_pylist()[0]["position"] == 35


def test_vectors_come_with_ids(classifier, fasta, tmp_path):
    predict(classifier, fasta, tmp_path / "e.npz", ["predict.what=embeddings"])
    predict(classifier, fasta, tmp_path / "e.parquet", ["predict.what=embeddings"])
    predict(classifier, fasta, tmp_path / "t.npz", ["predict.what=token_embeddings"])
    means, each = np.load(tmp_path / "e.npz"), np.load(tmp_path / "t.npz")
    assert means["ids"].tolist() == ["q0", "q1", "q2", "q3"]
    assert means["embeddings"].shape == (4, 16)
    assert each["q2"].shape == (20, 16)
    assert np.allclose(each["q2"].mean(0), means["embeddings"][2], atol=1e-5)
    rows = pq.read_table(tmp_path / "e.parquet").to_pylist()
    assert np.allclose(rows[3]["embedding"], means["embeddings"][3])
    with pytest.raises(UserError, match=r"embeddings are written as .npz or .parquet"):
        predict(classifier, fasta, tmp_path / "e.csv", ["predict.what=embeddings"])


def test_answers_per_base_are_those_of_the_letters_also_across_stretches(annotator, fasta, tmp_path):
    text = fasta.read_text().split(">")[4].splitlines()[1]
    predict(annotator, fasta, tmp_path / "p.fasta")
    labels = (tmp_path / "p.fasta").read_text().split(">q3\n")[1].strip()
    assert labels == text.translate(str.maketrans("ACGT", "XYYZ"))
    rows = table(predict(annotator, fasta, tmp_path / "p.csv")[0])
    assert [row["position"] for row in rows if row["id"] == "q3"] == [str(n) for n in range(1, 42)]


def test_tracks_of_an_interval_on_the_reverse_strand_lie_on_the_genome(annotator, fasta, tmp_path):
    text = fasta.read_text().split(">")[4].splitlines()[1]
    (tmp_path / "x.bed").write_text("q3\t5\t35\tpeak\t0\t-\n")
    over = [f"predict.reference={fasta}"]
    predict(annotator, tmp_path / "x.bed", tmp_path / "p.bedgraph", over)
    predict(annotator, tmp_path / "x.bed", tmp_path / "p.gff", over)
    predict(annotator, tmp_path / "x.bed", tmp_path / "p.wig", over)
    track = (tmp_path / "p.bedgraph").read_text().split("track type=bedGraph")[1].splitlines()[1:]
    values = np.full(41, np.nan)
    for line in track:  # the class X, which is the letter A: on the reverse strand a T of the genome
        contig, start, end, value = line.split("\t")
        assert contig == "q3"
        values[int(start) : int(end)] = float(value)
    assert np.isnan(values[:5]).all()
    assert np.isnan(values[35:]).all()
    assert [at for at in range(5, 35) if values[at] > 0.5] == [at for at in range(5, 35) if text[at] == "T"]
    calls = [line.split("\t") for line in (tmp_path / "p.gff").read_text().splitlines()[1:]]
    covered = sorted(at for c in calls if c[8] == "class=X" for at in range(int(c[3]), int(c[4]) + 1))
    assert covered == [at + 1 for at in range(5, 35) if text[at] == "T"]
    wig = (tmp_path / "p.wig").read_text().splitlines()
    assert wig[1] == "fixedStep chrom=q3 start=6 step=1"


def test_a_language_model_streams_to_the_same_figures(reader, tmp_path):
    run, genome = reader
    rows = {}
    for chunk in (50, 1000):
        rows[chunk] = table(
            predict(run, genome, tmp_path / "s.csv", ["predict.stream=true", f"predict.chunk={chunk}"])[0]
        )[0]
    assert float(rows[50]["perplexity"]) == pytest.approx(float(rows[1000]["perplexity"]), rel=1e-5)
    in_stretches = table(predict(run, genome, tmp_path / "w.csv")[0])[0]
    assert float(in_stretches["perplexity"]) == pytest.approx(float(rows[50]["perplexity"]), rel=0.02)
    predict(run, genome, tmp_path / "bits.wig")
    bits = np.array([float(line) for line in (tmp_path / "bits.wig").read_text().splitlines()[2:]])
    assert len(bits) == 1200
    assert bits.mean() == pytest.approx(float(in_stretches["bits_per_base"]), rel=1e-3)


@pytest.mark.parametrize(("task", "tokens"), [("causal", "kmer:3:3"), ("masked", "bpe:64")])
def test_tokens_of_several_letters_give_figures_per_token_and_per_base_and_tracks(
    reader, recipe, tmp_path, task, tokens
):
    _, genome = reader
    data = {"path": str(genome), "split": "positions", "length": 64, "overlap": 32, "tokens": tokens}
    run = fit(recipe(task, data, None, ["attention=linear"]), run_dir=tmp_path / "run", quiet=True).run_dir
    row = table(predict(run, genome, tmp_path / "p.csv")[0])[0]
    prefix = "masked_" if task == "masked" else ""
    nats = float(row[f"{prefix}nats_per_base"])
    assert float(row[f"{prefix}perplexity"]) == pytest.approx(np.exp(nats), rel=1e-4)
    predict(run, genome, tmp_path / "bits.wig")
    bits = np.array([float(line) for line in (tmp_path / "bits.wig").read_text().splitlines()[2:]])
    assert len(bits) == 1200
    assert bits.sum() * np.log(2) == pytest.approx(nats * 1200, rel=1e-3)
    each = np.log(float(row[f"{prefix}perplexity_per_token"]))
    if tokens == "kmer:3:3":  # every token has three letters
        assert each == pytest.approx(3 * nats, rel=1e-4)
    else:
        assert each > nats
    figures = json.loads((run / "metrics.json").read_text())["test"]
    assert {f"{prefix}perplexity_per_token", f"{prefix}bits_per_base"} <= set(figures)


def test_variants_come_back_scored_and_what_is_skipped_says_why(reader, tmp_path, caplog):
    run, genome = reader
    text = genome.read_text().splitlines()[1]
    other = {"A": "C", "C": "G", "G": "T", "T": "A"}
    head = "##fileformat=VCFv4.2\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n"
    rows = [
        f"chr1\t100\trs1\t{text[99]}\t{other[text[99]]},<DEL>\t.\tPASS\tDP=3",
        f"chr1\t200\trs2\t{other[text[199]]}\t{text[199]}\t.\tPASS\t.",
    ]
    (tmp_path / "v.vcf").write_text(head + "\n".join(rows) + "\n")
    over = [f"predict.reference={genome}"]
    predict(run, tmp_path / "v.vcf", tmp_path / "out.vcf", over)
    assert "2 of 3 variants are not scored: 1 symbolic allele, 1 REF" in caplog.text
    lines = (tmp_path / "out.vcf").read_text().splitlines()
    assert any(line.startswith("##INFO=<ID=LLR,Number=A,Type=Float") for line in lines)
    first, second = (line.split("\t") for line in lines if not line.startswith("#"))
    assert first[:7] == rows[0].split("\t")[:7]
    info = dict(part.split("=", 1) for part in first[7].split(";"))
    assert info["DP"] == "3"
    assert info["LLR"].endswith(",.")
    assert info["NOT_SCORED"] == "symbolic_allele"
    assert "LLR" not in second[7]
    assert "the_reference_has" in second[7]
    scored = table(predict(run, tmp_path / "v.vcf", tmp_path / "out.tsv", over)[0])
    assert float(scored[0]["llr"]) == pytest.approx(float(info["LLR"].split(",")[0]), rel=1e-3)
    assert [row["status"] for row in scored][:2] == ["scored", "symbolic allele"]
    assert scored[2]["llr"] == ""
    predict(run, tmp_path / "v.vcf", tmp_path / "out.parquet", over)


@pytest.mark.parametrize(
    ("name", "text", "output", "says"),
    [
        ("x.fa", ">a\nAC-GT\n", "p.csv", "record 1 'a', position 3: gap '-'"),
        ("x.fa", ">a\nACGTACGT\n", "p.xlsx", r"a table is written as .csv .tsv .jsonl .parquet"),
        ("x.vcf", "#CHROM\tPOS\tID\tREF\tALT\nc\t1\t.\tA\tC\n", "p.csv", "holds changes of a reference: name it"),
        ("x.bed", "c\t1\t5\n", "p.csv", "holds places, not sequences: name the genome"),
    ],
)
def test_mistakes_are_one_line(classifier, tmp_path, name, text, output, says):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=says) as caught:
        predict(classifier, tmp_path / name, tmp_path / output)
    assert "\n" not in str(caught.value)


def test_what_is_inside_can_be_seen(classifier, fasta, tmp_path):
    files = inspect(classifier, fasta, tmp_path / "seen")
    names = {path.name for path in files}
    assert {"saliency.csv", "q0.png", "attention-q0.png", "attention-q0.npz"} <= names
    assert {"mutagenesis.csv", "mutagenesis-q0.png"} <= names
    effects = table(tmp_path / "seen" / "mutagenesis.csv")
    assert len([row for row in effects if row["id"] == "q2"]) == 3 * 20
    assert len({row["difference_yes"] for row in effects}) > 20
    attention = np.load(tmp_path / "seen" / "attention-q2.npz")["attention"]
    assert attention.shape == (20, 20)
    assert np.allclose(attention.sum(1), 1, atol=1e-4)
    rows = table(tmp_path / "seen" / "saliency.csv")
    assert [row["letter"] for row in rows if row["id"] == "q2"] == list(fasta.read_text().split(">")[3].splitlines()[1])
    assert len({row["saliency"] for row in rows}) > 10
