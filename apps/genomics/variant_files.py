"""From a file of variants to a file of scores: reference check, windows, and writing back into the VCF."""

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apps.genomics.agreement import agreement
from apps.genomics.data_section import PLAIN
from apps.genomics.inputs import length_problem
from apps.genomics.recipe import PredictSection
from apps.genomics.reference import Reference
from apps.genomics.scoring import Window, score_windows
from apps.genomics.sequences import form_of, read_records
from apps.genomics.tables import write_table
from apps.genomics.task import GenomicsTask
from apps.genomics.variants import Variant, VariantFile, changed, check_letters, check_reference, read_variants
from core.training.errors import UserError
from core.training.rows import kind

log = logging.getLogger(__name__)
LONGEST = 2048
"""Letters around a variant, at most, when neither the recipe nor the training data says how many."""
INFO = {
    "llr": ("LLR", "log p(alternative) - log p(reference), mean of the strands"),
    "llr_forward": ("LLR_F", "log p(alternative) - log p(reference), forward strand"),
    "llr_reverse": ("LLR_R", "log p(alternative) - log p(reference), reverse strand"),
    "distance": ("DIST", "Euclidean distance of mean embeddings"),
}


def predict_variants(
    task: GenomicsTask, settings: PredictSection, spec: dict[str, Any], path: Path, output: Path
) -> Path:
    """Score every variant of a VCF or mutation list; what cannot be scored stays in the file with the reason.

    Raises:
        UserError: no reference, a contig that it has not, or a suffix that cannot hold the scores.
    """
    found = read_variants(path)
    as_vcf = output.suffix.lower() == ".vcf"
    if as_vcf and not found.header:
        raise UserError(f"{output}: a mutation list is written as a table (.csv .tsv .jsonl .parquet)")
    reference = open_reference(settings, spec, path)
    size = window_size(task, settings)
    windows, ready = [], []
    for variant in found.variants:
        contig = _contig(variant, reference)
        check_letters(variant, task.model.tokens.alphabet)
        if not variant.skipped:
            window = cut_window(variant, reference, contig, size)
            _check_length(task, window)
            if not variant.skipped:
                windows.append(window)
                ready.append(variant)
    scores: dict[int, dict[str, float]] = {}
    batch = settings.batch_size
    for at in range(0, len(windows), batch):
        part = score_windows(task, windows[at : at + batch], flank=settings.flank, size=batch)
        scores |= {id(variant): score for variant, score in zip(ready[at:], part)}
    skipped = Counter(_reason(variant) for variant in found.variants if variant.skipped)
    if skipped:
        told = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
        log.warning("%d of %d variants are not scored: %s", sum(skipped.values()), len(found.variants), told)
    if not found.variants:
        log.warning("%s lists no variant", path)
    if settings.against is not None:
        protein = spec["tokens"]["alphabet"] == "protein"
        name, figures = agreement(found.variants, scores, str(settings.against), protein=protein)
        told = "  ".join(f"{key} {value:.4g}" for key, value in figures.items())
        log.warning("%s against %s  %s", name, settings.against, told)  # predict shows nothing below a warning
    if as_vcf:
        return _write_vcf(output, found, scores)
    return write_table(output, _rows(found.variants, scores, bool(found.header)))


def window_size(task: GenomicsTask, settings: PredictSection) -> int:
    """Letters around a variant that are scored."""
    return settings.context or min(task.spec["longest"], LONGEST)


def open_reference(settings: PredictSection, spec: dict[str, Any], path: Path) -> Reference:
    """The genome or wild type that variants are changes of.

    Raises:
        UserError: none is named.
    """
    given = settings.reference or spec["reading"]["reference"]
    if given is None:
        raise UserError(f"{path} holds changes of a reference: name it, as in predict.reference=genome.fa")
    if kind(path) == ".vcf":
        return Reference.open(given)
    # A wild type is short, and proteins have no place in an index of bases.
    options = PLAIN.model_copy(update={"alphabet": spec["tokens"]["alphabet"]})
    form_of(str(given), options)
    records = read_records(str(given), options, labels=False).records
    contigs = {record.id: record.sequence for record in records}
    return Reference(Path(given), contigs, {name: len(text) for name, text in contigs.items()})


def _reason(variant: Variant) -> str:
    """Why a variant is skipped, without what differs between variants."""
    reason = variant.skipped.split(",")[0]
    return "REF differs from the reference" if reason.startswith("REF is") else reason


def _contig(variant: Variant, reference: Reference) -> str:
    if variant.contig in reference.lengths or variant.contig or len(reference.lengths) != 1:
        return variant.contig
    return next(iter(reference.lengths))  # a mutation list without ids means the one wild type


def cut_window(variant: Variant, reference: Reference, contig: str, size: int) -> Window:
    """The stretch of the reference around a variant, and whether the reference agrees with it."""
    length = reference.length(contig, variant.where)
    first = variant.changes[0][0]
    last = max(at + len(ref) for at, ref, _ in variant.changes)
    if last > length:
        variant.skipped = f"lies beyond {contig}, which has {length} letters"
        return Window(variant, "", 0)
    spare = max(0, size - (last - first))
    start = max(0, min(first - spare // 2, length - size))
    end = min(length, max(last, start + size))
    letters = reference.fetch(contig, start, end, "+", variant.where).upper()
    check_reference(variant, letters, start)
    return Window(variant, letters, start)


def _check_length(task: GenomicsTask, window: Window) -> None:
    """Mark a variant as skipped if the model cannot read its window, before the change or after it."""
    variant, tokens = window.variant, task.model.tokens
    for letters in () if variant.skipped else (window.letters, changed(window.letters, window.start, variant)):
        count = len(tokens.encode(tokens.alphabet.encode(letters, variant.where)))
        variant.skipped = variant.skipped or length_problem(task, count)


def _rows(variants: Sequence[Variant], scores: dict[int, dict[str, float]], vcf: bool) -> list[dict[str, object]]:
    names = list(dict.fromkeys(name for score in scores.values() for name in score))
    rows = []
    for variant in variants:
        if vcf:
            at, ref, alt = variant.changes[0]
            row: dict[str, object] = {"id": variant.id, "contig": variant.contig, "pos": at + 1, "ref": ref, "alt": alt}
        else:
            row = dict(variant.row)
        score = scores.get(id(variant), {})
        row |= {name: score.get(name) for name in names}
        rows.append(row | {"status": variant.skipped or "scored"})
    return rows


def _write_vcf(output: Path, found: VariantFile, scores: dict[int, dict[str, float]]) -> Path:
    """The user's VCF with scores in INFO, a value per alternative allele, "." where there is none."""
    by_line: dict[int, list[Variant]] = {}
    for variant in found.variants:
        by_line.setdefault(variant.line, []).append(variant)
    names = list(dict.fromkeys(name for score in scores.values() for name in score))
    with output.open("w") as file:
        for line in found.header:
            if line.startswith("#CHROM"):
                for name in names:
                    tag, meaning = INFO.get(
                        name, (name.upper(), "answer to the alternative minus that to the reference")
                    )
                    file.write(f'##INFO=<ID={tag},Number=A,Type=Float,Description="{meaning}">\n')
                file.write('##INFO=<ID=NOT_SCORED,Number=.,Type=String,Description="why an allele has no score">\n')
            file.write(line + "\n")
        for number, line in enumerate(found.lines):
            cells = line.split("\t")
            told = [] if len(cells) < 8 or cells[7] in (".", "") else [cells[7]]
            alleles = by_line[number]
            for name in names:
                values = [scores.get(id(variant), {}).get(name) for variant in alleles]
                if any(value is not None for value in values):
                    tag = INFO.get(name, (name.upper(), ""))[0]
                    told.append(f"{tag}={','.join('.' if value is None else f'{value:.5g}' for value in values)}")
            reasons = sorted({variant.skipped for variant in alleles if variant.skipped})
            if reasons:
                told.append(
                    "NOT_SCORED=" + ",".join(r.replace(" ", "_").replace(",", "").replace(";", "") for r in reasons)
                )
            cells += ["."] * (8 - len(cells))
            cells[7] = ";".join(told) or "."
            file.write("\t".join(cells) + "\n")
    return output
