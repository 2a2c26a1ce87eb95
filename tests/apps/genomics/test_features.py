"""Coordinates: 0-based and 1-based files agree, joins and strands are read base by base, on real annotations."""

import numpy as np
import pytest

from apps.genomics.alphabet import DNA
from apps.genomics.data_section import DataSection
from apps.genomics.features import class_names, label_places, mirrored
from apps.genomics.intervals import Place, read_bed, read_gff
from apps.genomics.orfs import frame_labels, open_frames
from apps.genomics.reference import Reference
from apps.genomics.sequences import read_records
from core.training.errors import UserError


@pytest.fixture(scope="module")
def genome(tmp_path_factory):
    path = tmp_path_factory.mktemp("genome") / "g.fa"
    path.write_text(">chr1 test\nAACCGGTTAC\nGTTTGCA\n>chr2\nACGTN\n")
    return path


def test_bed_counts_from_0_and_gff_from_1(tmp_path, genome):
    (tmp_path / "x.bed").write_text("#c\ntrack x\nchr1\t2\t6\tgene\t0\t-\nchr2 0 2\n")
    (tmp_path / "x.gff").write_text("##gff-version 3\nchr1\ts\tgene\t3\t6\t.\t-\t.\tID=a\n##FASTA\n>x\n")
    bed, gff = list(read_bed(tmp_path / "x.bed")), list(read_gff(tmp_path / "x.gff"))
    assert [(p.contig, p.start, p.end, p.strand, p.key) for p in bed] == [
        ("chr1", 2, 6, "-", "gene"),
        ("chr2", 0, 2, "", None),
    ]
    assert [(p.contig, p.start, p.end, p.strand, p.key) for p in gff] == [("chr1", 2, 6, "-", "gene")]
    reference = Reference.open(genome)
    assert reference.fetch("chr1", 2, 6, "+", "x") == "CCGG"
    assert reference.fetch("chr1", 0, 4, "-", "x") == "GGTT"
    assert reference.fetch("chr1", 8, 12, "+", "x") == "ACGT"  # over the end of a line
    assert reference.fetch("chr2", 3, 7, "+", "x", pad=True) == "TNNN"
    records = read_records(str(tmp_path / "x.bed"), DataSection(reference=str(genome), width=6)).records
    assert [(r.id, r.start, r.sequence) for r in records] == [
        ("chr1:2-6(-)", 1, "ACCGGT"),
        ("chr2:0-2(.)", -2, "NNACGT"),
    ]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("chr1\t5\t5\n", "line 1: the interval 5-5 is empty"),
        ("chr1\t7\t5\n", "empty, turned round or negative"),
        ("chr1\tx\t5\n", "must be whole numbers"),
        ("chr1\t5\n", "at least contig, start and end"),
        ("chr1\t1\t5\tn\t0\tx\n", r"strand must be \+, - or ., got 'x'"),
        ("1\t1\t5\n", r"no contig '1' \(did you mean 'chr1'\?\)"),
        ("chr1\t10\t50\n", "chr1:10-50 leaves the contig, which has 17 bases"),
    ],
)
def test_bad_intervals_are_named(tmp_path, genome, text, says):
    (tmp_path / "x.bed").write_text(text)
    with pytest.raises(UserError, match=says):
        read_records(str(tmp_path / "x.bed"), DataSection(reference=str(genome)))


def test_classes_and_their_mirror():
    names = class_names(["CDS"], "frame")
    assert names == ["none", "CDS+1", "CDS+2", "CDS+3", "CDS-1", "CDS-2", "CDS-3"]
    assert [names[at] for at in mirrored(names)] == ["none", "CDS-1", "CDS-2", "CDS-3", "CDS+1", "CDS+2", "CDS+3"]
    assert mirrored(["H", "E", "C"]) == [0, 1, 2]


def test_lines_of_one_feature_are_joined_and_the_reverse_strand_is_read_backwards():
    places = [
        Place("a", "c", 12, 15, "-", "CDS", "g1"),
        Place("b", "c", 2, 6, "-", "CDS", "g1"),
        Place("d", "c", 16, 19, "+", "CDS", "g2", phase=1),
    ]
    notes = {}
    labels = label_places({"c": 20}, places, ["CDS"], "frame", notes)["c"]
    names = class_names(["CDS"], "frame")
    assert [names[at][-2:] for at in labels[[14, 13, 12, 5, 4, 3, 2]]] == ["-1", "-2", "-3", "-1", "-2", "-3", "-1"]
    # Phase 1: one base belongs to the codon before, so it is a third position.
    assert [names[at][-2:] for at in labels[16:19]] == ["+3", "+1", "+2"]
    assert (labels[[0, 1, 6, 11, 15, 19]] == 0).all()
    assert notes["features used"] == 2


def test_an_overlap_goes_to_the_first_and_is_counted():
    notes = {}
    places = [Place("a", "c", 0, 5, "+", "CDS"), Place("b", "c", 3, 8, "-", "CDS")]
    labels = label_places({"c": 8}, places, ["CDS"], "strand", notes)["c"]
    assert labels.tolist() == [1, 1, 1, 1, 1, 2, 2, 2]
    assert notes["bases in two features, given to the first"] == 2
    with pytest.raises(UserError, match="no feature gene in the label file; there are CDS"):
        label_places({"c": 8}, places, ["gene"], "key", {})


def test_open_frames_of_both_strands():
    codes = DNA.encode("TT" + "ATG" + "GCA" * 40 + "TAA" + "CC", "x")
    assert open_frames(codes, least=90) == [(2, 2 + 3 + 120 + 3)]
    assert open_frames(codes, least=400) == []
    turned = DNA.reverse_complement(DNA.encode("GGATG" + "GCA" * 120 + "TAATT", "x"))
    labels = frame_labels(turned, ["none", "CDS+", "CDS-"])
    assert set(labels[2 : 2 + 3 + 360 + 3].tolist()) == {2}


# --- the real files ---------------------------------------------------------------------------------------------------


def test_phix_is_circular_and_its_genes_go_over_the_origin(shared_data):
    path = str(shared_data / "genomics" / "formats_biopython" / "NC_001422.gbk")
    record = read_records(path, DataSection(features=["CDS"], feature_labels="strand")).records[0]
    # Gene A begins at 3981 and goes on over the origin to 136 (in GenBank's counting).
    assert (record.label[3980:5386] == 1).all()
    assert (record.label[:136] == 1).all()


def test_slippage_in_sars_cov_2_is_read_base_by_base(shared_data):
    path = str(shared_data / "genomics" / "genomes" / "sars_cov2_reference.gb")
    options = DataSection(features=["CDS"], feature_labels="frame")
    reading = read_records(path, options)
    record = reading.records[0]
    names = class_names(["CDS"], "frame")
    spike = record.sequence[21562:21565]
    assert spike.upper() == "ATG"
    assert [names[at] for at in record.label[21562:21565]] == ["CDS+1", "CDS+2", "CDS+3"]


def test_genbank_and_gff_say_the_same_of_e_coli(shared_data):
    folder = shared_data / "genomics" / "genomes"
    record = read_records(
        str(folder / "NC_000913.gbk.gz"), DataSection(features=["CDS"], feature_labels="strand")
    ).records[0]
    places = list(read_gff(folder / "escherichia_coli.gff.gz"))
    first = next(place for place in places if place.key == "CDS")
    assert (first.start, first.end, first.strand) == (189, 255, "+")  # thrL, 190..255 in both files
    assert record.sequence[189:192] == "ATG"
    assert (record.label[189:255] == 1).all()
    assert record.label[188] == record.label[255] == 0
    labels = label_places({"NC_000913.3": len(record.sequence)}, places, ["CDS"], "strand", {})["NC_000913.3"]
    # The two files were made at different dates, and pseudogenes have CDS in the GFF alone.
    alike = labels == record.label
    for place in places:
        if place.key == "pseudogene":
            alike[place.start : place.end] = True
    assert np.mean(alike) > 0.995
    codes = DNA.encode(record.sequence, "x")
    reverse = next(place for place in places if place.key == "CDS" and place.strand == "-")
    start = DNA.decode(DNA.reverse_complement(codes[reverse.end - 3 : reverse.end]))
    assert start in ("ATG", "GTG", "TTG")
