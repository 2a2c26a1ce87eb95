"""The section `data` of a genomics recipe; the line under a field is its help text. No torch here."""

import re
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from apps.genomics.words import check_tokens
from core.attention.registry import nearest
from core.training.recipe import Section

Share = Annotated[float, Field(gt=0, lt=1)]
Files = str | Annotated[dict[str, str], Field(min_length=1)]


class GeneratedSection(Section):
    """The generated sequences of the demo: their best possible accuracy is known, see `generated.py`."""

    sequences: int = Field(3000, ge=60)
    """How many, a tenth of them for validation and a fifth for the test."""
    length: int = Field(120, ge=40)
    """Bases of each."""
    noise: float = Field(0.05, ge=0, lt=0.5)
    """Share of labels that are flipped, so that nothing can be right more often than 1 - noise."""
    seed: int = Field(0, ge=0)
    """Of the sequences; the seed of the run does not change the data."""


class DataSection(Section):
    """Where the sequences and their labels come from, how they are checked, and how they are cut."""

    path: Files | None = None
    """One file of sequences, which `split` cuts into parts; or {label: file}, where the file tells the class."""
    train: Files | None = None
    """Training file, in place of `path`; val and test go with it."""
    val: Files | None = None
    """Validation file; null: `val_share` of the training part."""
    test: Files | None = None
    """Test file; null: nothing is tested."""
    file: Files | None = None
    """Public file or {label: file}, looked for in the folder LONGSPAN_DATA when neither path nor train is given."""
    test_file: Files | None = None
    """Public test file; `file` is then the training part."""
    origin: str | None = None
    """Where the public files can be had, for the error message when they are not there."""
    generated: GeneratedSection | None = None
    """Make the sequences instead of reading a file."""

    format: Literal["fasta", "fastq", "table", "lines", "genbank", "embl", "bed", "gff", "arff"] | None = None
    """How the file is written; null: by its suffix, which may end in .gz."""
    alphabet: Literal["dna", "protein"] = "dna"
    """Which letters there are. RNA is read as DNA."""
    tokens: str = "char"
    """char, kmer:6 (overlapping), kmer:6:6 (side by side), or bpe:1024 (learned from the training part)."""
    columns: list[str] | None = Field(None, min_length=1)
    """Names of the columns of a table that has no header line."""
    sequence: str | None = None
    """Column with the sequence; null: sequence, seq or text. In an ARFF file all columns of single letters."""
    label: str | list[str] | None = None
    """Column with the label, or several for several targets; null: label, target or class."""
    id: str | None = None
    """Column with the id; null: id or name, else the record's number."""
    group: str | None = None
    """Column that says which records belong together (a genome, a family), for split=group."""
    header: str | None = None
    """Regular expression over FASTA headers with the named groups id, label, group and split, as far as they occur."""
    labels_path: str | None = None
    """FASTA with a label letter per base, ids as in the sequence file; or BED or GFF intervals over its records."""
    labels_file: str | None = None
    """The same, public."""
    labels_header: str | None = None
    """Regular expression over its headers with the named groups split and val."""
    mask_path: str | None = None
    """FASTA of 0 and 1: only bases with 1 are trained on and scored."""
    mask_file: str | None = None
    """The same, public."""
    reference: str | None = None
    """FASTA with the sequences that BED, GFF or coordinate columns (region, start, end, strand) point into."""
    width: int | None = Field(None, ge=1)
    """Intervals are cut or widened to this many bases around their middle; null: taken as they are."""
    features: list[str] | None = Field(None, min_length=1)
    """Feature keys of GenBank, EMBL or GFF that become labels per base, such as [CDS]."""
    feature_labels: Literal["key", "strand", "frame"] = "key"
    """key: the feature's key; strand: key and strand; frame: position in the codon on either strand (CDS only)."""
    sites: list[int] | None = Field(None, min_length=1)
    """Read these positions alone, counted from 1: for variants of one parent that differ at a few sites."""
    duplicate_ids: Literal["error", "number"] = "error"
    """Two records with one id: an error, or the second is called id#2."""
    min_quality: int | None = Field(None, ge=1, le=93)
    """FASTQ: bases of a lower quality (Phred, offset 33) are read as N; null: qualities are not looked at."""
    lower: Literal["read", "mask"] = "read"
    """Lower-case (soft-masked) bases: read like the others, or seen but neither trained on nor scored."""
    negatives: Literal["none", "segments", "genome"] = "none"
    """A second class for a file of positives. segments: copies with 12 of 20 segments random (DeePromoter's rule);
    genome: random places of `negatives_from`."""
    negatives_from: str | None = None
    """FASTA or GenBank file that negatives=genome draws from."""
    negatives_file: str | None = None
    """The same, public."""

    split: Literal["random", "group", "cluster", "folds", "positions", "given"] = "random"
    """How `path` is cut. given: by `split_column` or the header; positions: the first bases of every record train, the
    last test; cluster: sequences that share k-mers stay together."""
    split_column: str | None = None
    """Column whose values are train, val (valid, validation, dev) and test."""
    val_column: str | None = None
    """Column whose true rows are the validation part of the training rows."""
    val_share: Share = 0.1
    """Share of the validation part."""
    validate_on: Literal["val", "nothing"] = "val"
    """nothing: the validation part is trained on too, and the last epoch counts; choose all settings before that."""
    test_share: Share = 0.2
    """Share of the test part, where no test file is given."""
    split_seed: int = Field(0, ge=0)
    """Of random, group, cluster and folds; the seed of the run does not change the split."""
    fold: int = Field(0, ge=0)
    """Which fold is the test part (split=folds)."""
    folds: int = Field(10, ge=2)
    """How many folds."""
    identity: Share = 0.5
    """Sequences that share at least this part of their k-mers are near copies (split=cluster, leak check)."""
    leaks: Literal["warn", "drop", "refuse", "off"] = "warn"
    """Test sequences with a copy in the training part: said, left out of the figures, an error, or not looked for."""

    length: int | None = Field(None, ge=8)
    """Longest stretch in tokens that the model sees at once; null: whole sequences."""
    stride: int | None = Field(None, ge=1)
    """Bases between two training stretches of a longer sequence; null: `length`, side by side."""
    overlap: int = Field(0, ge=0)
    """Bases that stretches share in validation, test and prediction, so that no scored base lacks its context."""
    packing: bool = False
    """Sequences of a batch end to end in one row, without attention between them; batches are then drawn regardless
    of length. false: padded rows, in batches of similar length."""
    crop: Literal["error", "start", "centre", "end"] = "error"
    """What happens to a sequence longer than `length` that has one label: an error, or which part stays."""

    @model_validator(mode="after")
    def _sources_agree(self) -> Self:
        given = [name for name in ("generated", "path", "train") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"data.{given[0]} and data.{given[1]} both say where the sequences are: give one of them")
        if self.train is None and (self.val is not None or self.test is not None):
            raise ValueError("data.val and data.test go with data.train; data.path is one file that data.split cuts")
        check_tokens(self.tokens, self.alphabet)
        for name in ("header", "labels_header"):
            pattern = getattr(self, name)
            if pattern is not None:
                _check_pattern(name, pattern)
        if self.val_share + self.test_share >= 1:
            raise ValueError(
                f"val_share + test_share must leave a training part, got {self.val_share + self.test_share}"
            )
        if self.fold >= self.folds:
            raise ValueError(f"fold counts from 0 and must be below folds={self.folds}, got {self.fold}")
        if self.length is not None and self.overlap >= self.length:
            raise ValueError(f"overlap must be less than length={self.length}, got {self.overlap}")
        if self.sites is not None and (min(self.sites) < 1 or self.sites != sorted(set(self.sites))):
            raise ValueError(f"sites count from 1 and rise, got {self.sites}")
        if self.overlap and self.length is None:
            raise ValueError("overlap belongs to stretches of data.length, which is not given")
        if self.min_quality is not None and self.alphabet == "protein":
            raise ValueError("min_quality reads bases as N, which is an amino acid: it is for alphabet=dna")
        if self.negatives == "genome" and self.negatives_from is None and self.negatives_file is None:
            raise ValueError("negatives=genome needs data.negatives_from, a FASTA or GenBank file")
        return self


PLAIN = DataSection.model_validate({})
"""A file of which nothing is said: it is read by its suffix."""


def _check_pattern(name: str, pattern: str) -> None:
    try:
        groups = re.compile(pattern).groupindex
    except re.error as error:
        raise ValueError(f"{name} is not a regular expression: {error}") from error
    allowed = ("id", "label", "group", "split") if name == "header" else ("split", "val")
    wrong = [group for group in groups if group not in allowed]
    if wrong or not groups:
        said = f"the group {wrong[0]!r}{nearest(wrong[0], allowed)}" if wrong else "no named group"
        raise ValueError(f"{name} has {said}; write (?P<NAME>...) with NAME one of {', '.join(allowed)}")
