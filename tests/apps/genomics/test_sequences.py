"""Reading: every form of file gives the same records, and what is wrong with one is said in one line."""

import gzip

import numpy as np
import pytest

from apps.genomics.data_section import DataSection
from apps.genomics.sequences import form_of, read_records
from core.training.errors import UserError

FASTA = ">a first\nACGT\nAC\n>b\nGGGG\n"


def read(path, labels=True, **options):
    return read_records(str(path), DataSection(**options), labels=labels).records


def pairs(records):
    return [(record.id, record.sequence, record.label) for record in records]


@pytest.mark.parametrize(
    ("name", "text", "options", "found"),
    [
        ("x.fa", FASTA, {}, [("a", "ACGTAC", None), ("b", "GGGG", None)]),
        ("x.fa", FASTA.replace("\n", "\r\n"), {}, [("a", "ACGTAC", None), ("b", "GGGG", None)]),
        ("x.txt", FASTA, {}, [("a", "ACGTAC", None), ("b", "GGGG", None)]),
        ("x.fastq", "@r1 x\nACGT\n+\nIIII\n", {}, [("r1", "ACGT", None)]),
        ("x.csv", "id,sequence,label\np,ACG,yes\n", {}, [("p", "ACG", "yes")]),
        ("x.tsv", "Seq\tclass\nACG\t1\n", {}, [("row1", "ACG", "1")]),
        ("x.csv", "name,s,u,v\np,ACG,1,2\n", {"sequence": "s", "label": ["u", "v"]}, [("p", "ACG", ["1", "2"])]),
        (
            "x.txt",
            "ACGT\t1.5\nGG\t2\n",
            {"columns": ["sequence", "label"]},
            [("row1", "ACGT", "1.5"), ("row2", "GG", "2")],
        ),
        ("x.data", "+,S10,\t\tacg tt\n", {"columns": ["label", "id", "sequence"]}, [("S10", "acgtt", "+")]),
        ("x.txt", "ACG CGT GTT\nGGA GAC\n", {}, [("line1", "ACGTT", None), ("line2", "GGAC", None)]),
        (
            "x.csv",
            "seq,label\nGGAT GATC,1\nACGT AC,0\n",
            {},
            [("row1", "GGATC", "1"), ("row2", "ACGTAC", "0")],
        ),
        ("x.txt", "ACGT\nGGA\n\n", {}, [("line1", "ACGT", None), ("line2", "GGA", None)]),
        ("x.tsv", "sequence\tlabel\nACG CGT GTT\t1\n", {}, [("row1", "ACGTT", "1")]),
        (
            "x.fa",
            ">q9 Nucleus-S test\nMK\n",
            {"header": r"(?P<id>\S+) (?P<label>\w+)-(?P<group>[MS])"},
            [("q9", "MK", "Nucleus")],
        ),
        (
            "x.arff",
            "% note\n@relation s\n@attribute 'name' {n1,n2}\n@attribute p1 {A, C}\n@attribute p2 {A, G}\n"
            "@attribute 'class' {EI, N}\n@data\nn1,A,G,EI\nn2,C,A,N\n",
            {},
            [("n1", "AG", "EI"), ("n2", "CA", "N")],
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and value.startswith("x.") else "",
)
def test_every_form_gives_its_records(tmp_path, name, text, options, found):
    (tmp_path / name).write_text(text, newline="")
    assert pairs(read(tmp_path / name, **options)) == found
    with gzip.open(tmp_path / f"{name}.gz", "wt", newline="") as file:
        file.write(text)
    if "columns" not in options and not name.endswith((".txt", ".data")):
        assert pairs(read(tmp_path / f"{name}.gz", **options)) == found


def test_a_file_per_class(tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.fa").write_text(f">{name}\nACGT\n")
    source = {"positive": str(tmp_path / "one.fa"), "negative": str(tmp_path / "two.fa")}
    assert pairs(read_records(source, DataSection()).records) == [
        ("one", "ACGT", "positive"),
        ("two", "ACGT", "negative"),
    ]


def test_a_file_to_predict_needs_no_labels_and_no_header_that_matches(tmp_path):
    (tmp_path / "x.fa").write_text(">q9\nMK\n")
    assert pairs(read(tmp_path / "x.fa", labels=False, header=r"(?P<label>\w+)-S")) == [("q9", "MK", None)]
    with pytest.raises(UserError, match=r"record 1: data.header does not match 'q9'"):
        read(tmp_path / "x.fa", header=r"(?P<label>\w+)-S")


@pytest.mark.parametrize(
    ("name", "text", "options", "says"),
    [
        ("x.fa", "", {}, r"x.fa is empty \(0 bytes\)"),
        ("x.fa", "ACGT\n", {}, "not a FASTA file|FASTA"),
        ("x.fa", ">a\nAC\n>\nGG\n", {}, "record 2: the header has no id"),
        ("x.fa", ">a\nAC\n>b\n\n", {}, "record 2 'b': the sequence is empty"),
        ("x.fa", ">a\nAC\n>a\nGG\n", {}, "record 2 'a': the id 'a' is there already, at .*record 1"),
        ("x.fastq", "@r1\nACGT\n+\nIII\n", {}, "x.fastq, record 1: "),
        ("x.csv", "id,seqence,label\na,ACG,1\n", {}, r"no column with sequences \(did you mean 'seqence'\?\)"),
        ("x.csv", "id,sequence,label\na,ACG,1\n", {"label": "lable"}, r"no column 'lable' \(did you mean 'label'\?\)"),
        ("x.csv", "id,sequence\n", {}, "a header and no rows"),
        ("x.txt", "ACGT\t1\nGG\n", {"columns": ["sequence", "label"]}, "line 2: 1 cells, data.columns names 2"),
        ("x.arff", "nothing\n", {}, "not an ARFF file"),
        ("x.bam", "x", {}, r"x.bam is binary \(.bam\)"),
        ("x.doc", "x", {}, "unknown suffix '.doc'"),
        ("x.gb", "nonsense\n", {}, "no record in it that can be read as genbank|cannot be read"),
        ("x.bed", "chr1\t1\t5\n", {}, "holds places, not sequences: name the genome"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(tmp_path, name, text, options, says):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=says) as caught:
        read(tmp_path / name, **options)
    assert "\n" not in str(caught.value)


def test_duplicate_ids_may_be_numbered(tmp_path):
    (tmp_path / "x.fa").write_text(">a\nAC\n>a\nGG\n>a\nTT\n")
    reading = read_records(str(tmp_path / "x.fa"), DataSection(duplicate_ids="number"))
    assert [record.id for record in reading.records] == ["a", "a#2", "a#3"]
    assert reading.notes == {"duplicate ids numbered": 2}


def test_sites_read_a_few_positions(tmp_path):
    (tmp_path / "x.fa").write_text(">a\nACGTAC\n")
    assert read(tmp_path / "x.fa", sites=[2, 5])[0].sequence == "CA"
    with pytest.raises(UserError, match="names position 9, there are 6 letters"):
        read(tmp_path / "x.fa", sites=[2, 9])


def test_gzip_that_was_cut_off(tmp_path):
    with gzip.open(tmp_path / "x.fa.gz", "wt") as file:
        file.write(">a\n" + "ACGT" * 5000)
    whole = (tmp_path / "x.fa.gz").read_bytes()
    (tmp_path / "x.fa.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="not a whole gzip file"):
        read(tmp_path / "x.fa.gz")


# --- the real files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "count", "letters"),
    [
        ("NC_005816.gb", 1, 9609),
        ("NC_005816.fna", 1, 9609),
        ("NC_001422.gbk", 1, 5386),
        ("TRBG361.embl", 1, 1859),
        ("example.fastq", 3, None),
        ("multi_ex.fasta", None, None),
        ("no_end_marker.gb", 1, None),
        ("bad_origin_wrap_fuzzy.gb", 1, None),
        ("one_of.gb", 1, None),
    ],
)
def test_files_of_biopython_are_read(shared_data, name, count, letters):
    records = read(shared_data / "genomics" / "formats_biopython" / name)
    assert count is None or len(records) == count
    assert letters is None or len(records[0].sequence) == letters
    assert all(record.sequence for record in records)


def test_a_binary_file_is_named_as_such(shared_data):
    with pytest.raises(UserError, match=r"binary \(.bb\); convert"):
        form_of(str(shared_data / "genomics" / "formats_biopython" / "bed3.bb"), DataSection())


def test_splice_has_sixty_bases_and_three_classes(shared_data):
    records = read(shared_data / "genomics" / "splice" / "splice.arff", duplicate_ids="number")
    labels, counts = np.unique([record.label for record in records], return_counts=True)
    assert dict(zip(labels, counts)) == {"EI": 767, "IE": 768, "N": 1655}
    assert {len(record.sequence) for record in records} == {60}


def test_kmer_text_becomes_the_sequence_again(shared_data):
    records = read(shared_data / "genomics" / "dnabert_prom6" / "dev.tsv")
    assert len(records) == 1000
    assert {len(record.sequence) for record in records} == {96 + 5}
    assert records[0].sequence.startswith("GTGGGGAGGGAGGCCGCC")


def test_bases_of_low_quality_read_as_n_and_are_counted(tmp_path):
    (tmp_path / "x.fq").write_text("@a\nACGT\n+\nI5!I\n@b\nGG\n+\n45\n")  # qualities 40 20 0 40, 19 20
    found = read_records(str(tmp_path / "x.fq"), DataSection(min_quality=20))
    assert [record.sequence for record in found.records] == ["ACNT", "NG"]
    assert found.notes == {"bases of a quality below 20, read as N": 2}
    assert [record.sequence for record in read(tmp_path / "x.fq")] == ["ACGT", "GG"]
    (tmp_path / "x.fa").write_text(FASTA)
    with pytest.raises(UserError, match=r"x.fa: data.min_quality is for FASTQ, this file is read as fasta"):
        read(tmp_path / "x.fa", min_quality=20)


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(UserError, match="is a folder; one file is wanted"):
        read(tmp_path)
