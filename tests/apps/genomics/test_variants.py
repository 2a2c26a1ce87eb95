"""Variants: read, checked against the reference, scored on both strands, and written back."""

import numpy as np
import pytest
import torch

from apps.genomics.agreement import agreement
from apps.genomics.alphabet import DNA
from apps.genomics.items import padded
from apps.genomics.reference import Reference
from apps.genomics.scoring import Window, differing, likelihood, score_windows
from apps.genomics.variant_files import cut_window
from apps.genomics.variants import Variant, changed, check_letters, check_reference, is_variants, read_variants
from core.training.errors import UserError

HEAD = "##fileformat=VCFv4.2\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n"


def vcf(tmp_path, *rows):
    path = tmp_path / "v.vcf"
    path.write_text(HEAD + "".join("\t".join(map(str, row)) + "\n" for row in rows))
    return path


def test_rows_become_one_variant_per_allele_and_positions_count_from_0(tmp_path):
    path = vcf(tmp_path, ["chr1", 5, "rs1", "A", "G,T", ".", ".", "."], ["chr1", 9, ".", "CAG", "c", ".", ".", "."])
    found = read_variants(path).variants
    assert [(v.id, v.changes, v.line, v.skipped) for v in found] == [
        ("rs1", [(4, "A", "G")], 0, ""),
        ("rs1", [(4, "A", "T")], 0, ""),
        ("chr1:9CAG>C", [(8, "CAG", "C")], 1, ""),
    ]
    assert is_variants(path)


@pytest.mark.parametrize(
    ("alt", "reason"),
    [
        ("<DEL>", "symbolic allele"),
        ("*", "symbolic allele"),
        ("A]chr2:5]", "symbolic allele"),
        (".", "no alternative allele"),
        ("A", "alternative equals reference"),
        ("N", "ambiguous letter"),
        ("R", "ambiguous letter"),
    ],
)
def test_what_cannot_be_scored_is_marked(tmp_path, alt, reason):
    variant = read_variants(vcf(tmp_path, ["chr1", 5, ".", "A", alt, ".", ".", "."])).variants[0]
    check_letters(variant, DNA)
    assert variant.skipped == reason


def test_position_0_is_a_telomere(tmp_path):
    found = read_variants(vcf(tmp_path, ["chr1", 0, ".", "A", "C", ".", ".", "."])).variants[0]
    assert found.skipped == "before the first base (a telomere)"


def test_a_letter_that_is_none_is_an_error_that_names_the_row(tmp_path):
    (tmp_path / "m.csv").write_text("mutant\nA5C\nA7Z\n")
    found = read_variants(tmp_path / "m.csv").variants
    check_letters(found[0], DNA)
    with pytest.raises(UserError, match=r"m.csv, line 3, A7Z, position 1: 'Z' is not a letter of dna"):
        check_letters(found[1], DNA)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (HEAD + "chr1 5 . A G\n", "line 3: a VCF row has at least CHROM POS ID REF ALT"),
        (HEAD + "chr1\tx\t.\tA\tG\n", "POS must be a whole number, got 'x'"),
        ("##fileformat=VCFv4.2\nchr1\t5\t.\tA\tG\n", "no line that starts with #CHROM"),
    ],
)
def test_a_file_that_is_no_vcf_is_named(tmp_path, text, says):
    (tmp_path / "v.vcf").write_text(text)
    with pytest.raises(UserError, match=says):
        read_variants(tmp_path / "v.vcf")


def test_mutation_lists_and_their_mistakes(tmp_path):
    path = tmp_path / "m.csv"
    path.write_text("mutant,fitness\nH24C,0.5\nH24C:A42T,1\nK3K,0\n")
    assert is_variants(path)
    found = read_variants(path).variants
    assert [v.changes for v in found] == [[(23, "H", "C")], [(23, "H", "C"), (41, "A", "T")], [(2, "K", "K")]]
    assert [v.skipped for v in found] == ["", "", "synonymous: equals the reference"]
    assert found[1].row == {"mutant": "H24C:A42T", "fitness": "1"}
    path.write_text("mutant\n24HC\n")
    with pytest.raises(UserError, match="line 2: '24HC' is no mutation; write H24C"):
        read_variants(path)


def test_scores_are_set_beside_measured_effects(tmp_path):
    path = tmp_path / "m.csv"
    path.write_text("mutant,effect,note\nA1C,0.1,x\nA1D,0.4,x\nA1E,,x\nA1F,0.3,x\nA1A,9,x\nA1G,0.2,x\n")
    found = read_variants(path).variants
    scores = {id(v): {"distance": 1.0, "llr": value} for v, value in zip(found, (-4.0, -1.0, 5.0, -2.0, 0.0, -3.0))}
    del scores[id(found[4])]  # the synonymous one is not scored
    name, figures = agreement(found, scores, "effect")
    assert name == "llr"
    assert figures["spearman"] == pytest.approx(1.0)
    assert figures["variants"] == 4  # one has no number, one no score
    assert "blosum62" not in figures
    _, figures = agreement(found, scores, "effect", protein=True)
    assert figures["blosum62"] == pytest.approx(-0.894, abs=1e-3)  # C and G 0, D and F -2
    with pytest.raises(UserError, match=r"line 2: .*=efect: no such column \(did you mean 'effect'\?\); has mutant"):
        agreement(found, scores, "efect")
    with pytest.raises(UserError, match="line 2: column note must be a number, got 'x'"):
        agreement(found, scores, "note")
    with pytest.raises(UserError, match="2 variants have a score and a number there, need 3"):
        agreement(found[:2], scores, "effect")


def test_changes_and_the_check_of_the_reference():
    variant = Variant("x", "x", "c", [(3, "A", "GG"), (6, "CT", "C")], 0)
    assert changed("CGTACGCTAA", 0, variant) == "CGTGGCGCAA"
    assert changed("TACGCTAA", 2, variant) == "TGGCGCAA"
    check_reference(variant, "CGTACGCTAA", 0)
    assert variant.skipped == ""
    check_reference(variant, "CGTACGCGAA", 0)
    assert variant.skipped == "REF is CT, the reference has CG at 7"


def test_windows_are_centred_and_stay_inside():
    text = "".join(np.random.default_rng(0).choice(list("ACGT"), 100))
    reference = Reference(None, {"c": text}, {"c": 100})

    def window(at, ref):
        return cut_window(Variant("x", "x", "c", [(at, ref, "A")], 0), reference, "c", 20)

    assert (window(50, text[50]).start, len(window(50, text[50]).letters)) == (41, 20)
    assert (window(2, text[2]).start, window(97, text[97]).start) == (0, 80)
    assert window(95, text[95] + "ACGTAC").variant.skipped == "lies beyond c, which has 100 letters"
    wrong = window(50, "A" if text[50] != "A" else "C")
    assert wrong.variant.skipped.startswith("REF is")


@pytest.fixture(scope="module")
def genome(tmp_path_factory, letters):
    path = tmp_path_factory.mktemp("variants") / "g.fa"
    path.write_text(">chr1\n" + letters(1, 1500)[0] + "\n")
    return {"path": str(path), "split": "positions", "length": 64}


def windows(text):
    other = {"A": "G", "C": "T", "G": "A", "T": "C"}
    return [
        Window(Variant("x", "snv", "c", [(30, text[30], other[text[30]])], 0), text, 0),
        Window(Variant("x", "deletion", "c", [(30, text[30:33], text[30])], 0), text, 0),
        Window(
            Variant("x", "two", "c", [(10, text[10], other[text[10]]), (40, text[40], other[text[40]])], 0), text, 0
        ),
    ]


@torch.no_grad()
def test_a_causal_model_compares_the_likelihood_of_both_windows_on_both_strands(genome, built, letters):
    _, _, task = built("causal", genome, {"stem": [4], "shortcut": "markov:3"})
    text = letters(1, 60, seed=3)[0]
    scores = score_windows(task, windows(text), flank=3)

    def total(sequence):
        ids, mask = padded([sequence])
        return float(likelihood(task, ids, mask).sum())

    for window, score in zip(windows(text), scores):
        before, after = (DNA.encode(t, "x") for t in (text, changed(text, 0, window.variant)))
        assert score["llr_forward"] == pytest.approx(total(after) - total(before), abs=1e-4)
        turned = total(DNA.reverse_complement(after)) - total(DNA.reverse_complement(before))
        assert score["llr_reverse"] == pytest.approx(turned, abs=1e-4)
        assert score["llr"] == pytest.approx((score["llr_forward"] + score["llr_reverse"]) / 2)
        assert score["distance"] > 0
    assert abs(scores[0]["llr_forward"] - scores[0]["llr_reverse"]) > 1e-3


@torch.no_grad()
def test_a_masked_model_compares_letters_at_the_masked_place(genome, built, letters):
    _, _, task = built("masked", genome, {"stem": [3]})
    text = letters(1, 60, seed=3)[0]
    scores = score_windows(task, windows(text), flank=3)
    assert scores[1]["distance"] > 0
    single = []
    for at in (10, 40):
        ids, mask = padded([DNA.encode(text, "x")])
        ids[0, at] = task.model.tokens.mask
        p = task.model(ids, mask)[0, at].log_softmax(-1)
        other = {"A": "G", "C": "T", "G": "A", "T": "C"}[text[at]]
        single.append(float(p["ACGT".index(other)] - p["ACGT".index(text[at])]))
    assert scores[2]["llr_forward"] == pytest.approx(sum(single), abs=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("tokens", ["char", "kmer:3:3", "bpe:64"])
def test_a_masked_model_gives_insertions_and_deletions_a_pseudo_log_likelihood_ratio(genome, built, letters, tokens):
    _, _, task = built("masked", {**genome, "tokens": tokens}, {"stem": [3]})
    text = letters(1, 60, seed=3)[0]
    coder = task.model.tokens
    for ref, alt in ((text[30:33], text[30]), (text[30], text[30] + "GATTACA"), (text[30], "ACGT"[text[30] != "C"])):
        if ref == alt:
            continue
        variant = Variant("x", "x", "c", [(30, ref, alt)], 0)
        score = score_windows(task, [Window(variant, text, 0)], flank=2)[0]
        if tokens == "char" and len(ref) == len(alt):
            continue
        totals = []
        pair = [coder.encode(DNA.encode(one, "x")) for one in (changed(text, 0, variant), text)]
        for ids, stretch in zip(pair, differing(*pair, 2)):
            total = 0.0
            for at in stretch:
                given = torch.from_numpy(ids.astype(np.int64))[None].clone()
                given[0, at] = coder.mask
                said = task.model(given, torch.ones_like(given, dtype=torch.bool))[0, at].log_softmax(-1)
                total += float(said[int(ids[at])])
            totals.append(total)
        assert score["llr_forward"] == pytest.approx(totals[0] - totals[1], abs=1e-4)


def test_the_stretch_that_differs_is_widened_by_its_flanks():
    old, new = (np.frombuffer(text, dtype=np.uint8) for text in (b"AACCGGTT", b"AACCCCGGTT"))
    # The two C may stand before or after those that are there: what is shared from the left is taken off first.
    assert differing(old, new, 0) == (range(4, 4), range(4, 6))
    assert differing(old, new, 2) == (range(2, 6), range(2, 8))
    assert differing(old, new, 99) == (range(8), range(10))
    assert differing(old, old, 0) == (range(8, 8), range(8, 8))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["causal", "masked"])
def test_a_score_does_not_hang_on_how_the_file_anchors_or_aligns_the_variant(genome, built, letters, kind):
    _, _, task = built(kind, genome, {"stem": [4]})
    text = letters(1, 20, seed=3)[0] + "GCACACAT" + letters(1, 20, seed=4)[0]
    said = [(20, "GCA", "G"), (21, "CAC", "C"), (24, "ACA", "A"), (19, text[19] + "GCA", text[19] + "G")]
    scores = score_windows(
        task, [Window(Variant("x", "x", "c", [one], 0), text, 0) for one in said], flank=4, distance=False
    )
    assert len({round(score["llr"], 5) for score in scores}) == 1
    assert scores[0]["llr"] != 0


@torch.no_grad()
@pytest.mark.parametrize("strand", ["average", "tied"])
@pytest.mark.parametrize("tokens", ["kmer:3", "bpe:64"])
def test_a_classifier_of_both_strands_scores_both_strands_alike(tmp_path, built, letters, strand, tokens):
    rows = [f"{text},{'ab'[n % 2]}" for n, text in enumerate(letters(60, 24))]
    (tmp_path / "x.csv").write_text("sequence,label\n" + "\n".join(rows) + "\n")
    _, _, task = built("classification", {"path": str(tmp_path / "x.csv"), "tokens": tokens}, {"strand": strand})
    text, pair = letters(1, 24, seed=9)[0], str.maketrans("ACGT", "TGCA")
    ours = Variant("x", "x", "c", [(10, text[10], "A" if text[10] != "A" else "C")], 0)
    _, ref, alt = ours.changes[0]
    theirs = Variant("x", "x", "c", [(13, ref.translate(pair), alt.translate(pair))], 0)
    one, two = score_windows(task, [Window(ours, text, 0), Window(theirs, text.translate(pair)[::-1], 0)], flank=0)
    assert one == pytest.approx(two, abs=1e-5)
    assert abs(one["difference_b"]) > 1e-4


@torch.no_grad()
@pytest.mark.parametrize("kind", ["causal", "masked"])
def test_the_score_does_not_know_which_strand_the_reference_is(genome, built, letters, kind):
    _, _, task = built(kind, genome, {"stem": [4]})
    text = letters(1, 60, seed=3)[0]
    pair = str.maketrans("ACGT", "TGCA")
    turned = text.translate(pair)[::-1]
    ours = Window(Variant("x", "x", "c", [(20, text[20], "A" if text[20] != "A" else "C")], 0), text, 0)
    _, ref, alt = ours.variant.changes[0]
    theirs = Window(Variant("x", "x", "c", [(39, ref.translate(pair), alt.translate(pair))], 0), turned, 0)
    one, two = (score_windows(task, [window], flank=3)[0] for window in (ours, theirs))
    assert one["llr"] == pytest.approx(two["llr"], abs=1e-5)
    assert one["llr_forward"] == pytest.approx(two["llr_reverse"], abs=1e-5)


def test_the_reference_is_read_by_interval_also_where_no_index_can_be_written(tmp_path, monkeypatch):
    import pyfaidx

    (tmp_path / "g.fa").write_text(">chr1\n" + "ACGT" * 99 + "aCgT\n")
    whole = pyfaidx.Fasta

    def locked(path, indexname, **options):
        if str(indexname).startswith(str(tmp_path)):
            raise PermissionError(13, "no")
        return whole(path, indexname=indexname, **options)

    monkeypatch.setattr(pyfaidx, "Fasta", locked)
    reference = Reference.open(tmp_path / "g.fa")
    assert reference.fetch("chr1", 398, 400, "+", "x") == "gT"
    assert reference.fetch("chr1", 394, 399, "-", "x") == "cGtAC"  # what is masked stays so
    assert not (tmp_path / "g.fa.fai").exists()
    with pytest.raises(UserError, match=r"has no contig '1' \(did you mean 'chr1'\?\)"):
        reference.length("1", "x")
    with pytest.raises(UserError, match="there is no reference file"):
        Reference.open(tmp_path / "none.fa")


# --- the real files ---------------------------------------------------------------------------------------------------


def test_real_vcf_files_are_read_and_what_is_symbolic_is_counted(shared_data):
    folder = shared_data / "genomics" / "formats_vcf_htslib"
    found = {name: read_variants(folder / name) for name in ("vcf_file.vcf", "formatcols.vcf", "test-vcf-hdr-in.vcf")}
    many = found["vcf_file.vcf"].variants
    assert len(many) > len(found["vcf_file.vcf"].lines)
    assert sum(bool(v.skipped) for v in many) == sum(v.skipped == "no alternative allele" for v in many) >= 1
    assert found["formatcols.vcf"].variants[0].changes == [(99, "A", "T")]
    first = found["test-vcf-hdr-in.vcf"].variants[:2]
    assert [v.changes[0][2] for v in first] == ["T", "A"]


def test_all_mutants_of_tem_1_agree_with_the_wild_type(shared_data):
    from apps.genomics.data_section import DataSection
    from apps.genomics.sequences import read_records

    folder = shared_data / "genomics" / "blat"
    mutants = read_records(
        str(folder / "P62593.fasta"), DataSection(alphabet="protein", duplicate_ids="number")
    ).records
    wild = next(r.sequence for r in mutants if "_P20P" in r.id)
    found = read_variants(folder / "BLAT_ECOLX_Ranganathan2015_labeled.csv").variants
    assert len(found) == 4996
    for variant in found:
        check_reference(variant, wild, 0)
    assert not any(variant.skipped for variant in found)
