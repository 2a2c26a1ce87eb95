"""Parts: copies stay together, groups stay whole, and every base of a position split is in one part."""

import numpy as np
import pytest

from apps.genomics.alphabet import DNA
from apps.genomics.data_section import DataSection
from apps.genomics.kmers import Index, clusters, sketch
from apps.genomics.leaks import find_leaks
from apps.genomics.negatives import add_negatives
from apps.genomics.records import Record
from apps.genomics.sequences import read_records
from apps.genomics.splits import set_aside, split_records
from core.training.errors import UserError

RANDOM = np.random.default_rng(0)


def made(count: int, length: int = 60) -> list[str]:
    return ["".join(RANDOM.choice(list("ACGT"), length)) for _ in range(count)]


def records(texts, **more):
    return [Record(f"r{n}", f"record {n}", text, **{k: v[n] for k, v in more.items()}) for n, text in enumerate(texts)]


def split(texts, options, **more):
    found = records(texts, **more)
    codes = [DNA.encode(text, "x") for text in texts]
    parts = split_records(found, codes, options, DNA)
    return {part: [span.record for span in spans] for part, spans in parts.items()}


def test_shares_are_met_and_nothing_is_lost():
    parts = split(made(200), DataSection(val_share=0.1, test_share=0.25))
    assert {part: len(chosen) for part, chosen in parts.items()} == {"train": 130, "val": 20, "test": 50}
    assert sorted(n for chosen in parts.values() for n in chosen) == list(range(200))
    assert parts == split(made(200), DataSection(val_share=0.1, test_share=0.25)), "the split is not that of the seed"
    assert parts != split(made(200), DataSection(val_share=0.1, test_share=0.25, split_seed=1))


def test_a_copy_and_its_reverse_complement_stay_in_one_part():
    texts = made(40)
    turned = [DNA.decode(DNA.reverse_complement(DNA.encode(text, "x"))) for text in texts]
    parts = split([*texts, *texts, *turned], DataSection())
    for chosen in parts.values():
        assert {n % 40 for n in chosen} == {n for n in chosen if n < 40}


def test_folds_cover_all_and_test_parts_do_not_meet():
    texts = made(53)
    tests = [split(texts, DataSection(split="folds", folds=5, fold=fold))["test"] for fold in range(5)]
    assert sorted(n for chosen in tests for n in chosen) == list(range(53))


def test_groups_stay_whole_and_a_record_without_one_is_named():
    groups = [f"g{n % 7}" for n in range(70)]
    parts = split(made(70), DataSection(split="group", test_share=0.3, val_share=0.2), group=groups)
    owners = [{groups[n] for n in chosen} for chosen in parts.values()]
    assert sum(map(len, owners)) == len(set.union(*owners)) == 7
    with pytest.raises(UserError, match="record 0: split=group needs a group"):
        split(made(3), DataSection(split="group"))


def test_near_copies_are_one_cluster():
    families = made(12, 200)
    texts = []
    for text in families:
        for _ in range(5):
            at = int(RANDOM.integers(200))
            texts.append(text[:at] + "A" + text[at + 1 :])
    found = clusters([DNA.encode(text, "x") for text in texts], DNA, 0.5)
    assert len(set(found.tolist())) == 12
    parts = split(texts, DataSection(split="cluster", test_share=0.3, val_share=0.2))
    for chosen in parts.values():
        assert len(chosen) % 5 == 0


def test_positions_cut_every_record_into_three():
    codes = [np.zeros(100, dtype=np.uint8), np.zeros(50, dtype=np.uint8)]
    spans = split_records(records(["A" * 100, "A" * 50]), codes, DataSection(split="positions", test_share=0.1), DNA)
    assert [(s.start, s.stop) for s in spans["train"]] == [(0, 80), (0, 40)]
    assert [(s.start, s.stop) for s in spans["val"]] == [(80, 90), (40, 45)]
    assert [(s.start, s.stop) for s in spans["test"]] == [(90, 100), (45, 50)]


def test_given_parts_by_the_words_people_use():
    said = ["train"] * 6 + ["valid", "dev", "Test", "testing"]
    parts = split(made(10), DataSection(split="given"), split=said)
    assert (parts["val"], parts["test"]) == ([6, 7], [8, 9])
    with pytest.raises(UserError, match="record 1: its part is 'tain', it must be train, val or test"):
        split(made(2), DataSection(split="given"), split=["train", "tain"])


def test_an_empty_part_is_an_error():
    with pytest.raises(UserError, match=r"leaves the .* part without a sequence"):
        split(made(2), DataSection())
    with pytest.raises(UserError, match="leaves the"):
        set_aside(records(["ACGT"]), [DNA.encode("ACGT", "x")], DataSection(), DNA)


def test_copies_are_found_on_either_strand_and_nearly():
    train = [DNA.encode(text, "x") for text in made(20, 150)]
    near = train[3].copy()
    near[70] = (near[70] + 1) % 4
    part = [train[0], DNA.reverse_complement(train[1]), near, DNA.encode(made(1, 150)[0], "x")]
    leaks = find_leaks(train, part, DNA, 0.5)
    assert leaks.exact.tolist() == [True, False, False, False]
    assert leaks.reversed_.tolist() == [False, True, False, False]
    assert leaks.near.tolist() == [False, False, True, False]
    assert leaks.copied.tolist() == [True, True, False, False]


def test_a_palindrome_is_an_exact_copy_and_counts_once():
    one = [DNA.encode("ACGT" * 10, "x")]
    leaks = find_leaks(one, one, DNA, 0.5)
    assert leaks.told() == {"exact": 1, "reverse complement": 0, "near": 0}


def test_sketches_do_not_know_the_strand_and_unrelated_sequences_share_none():
    one, other = (DNA.encode(text, "x") for text in made(2, 300))
    assert (sketch(one, DNA) == sketch(DNA.reverse_complement(one), DNA)).all()
    index = Index()
    index.add(0, sketch(one, DNA))
    assert index.similar(sketch(one, DNA), 0.9) == [0]
    assert index.similar(sketch(other, DNA), 0.1) == []


def test_a_sequence_and_what_was_made_of_it_stay_together():
    found = add_negatives(records(made(50, 100)), DataSection(negatives="segments"))
    assert [record.label for record in found] == ["positive"] * 50 + ["negative"] * 50
    codes = [DNA.encode(record.sequence, "x") for record in found]
    kept = [np.mean(a == b) for a, b in zip(codes[:50], codes[50:])]
    assert 0.5 < np.mean(kept) < 0.6  # 8 of 20 segments stay, a quarter of the random letters agree by chance
    for spans in split_records(found, codes, DataSection(), DNA).values():
        numbers = {span.record for span in spans}
        assert {n + 50 for n in numbers if n < 50} == {n for n in numbers if n >= 50}


# --- the real files ---------------------------------------------------------------------------------------------------


def test_exactly_a_hundred_enhancers_are_copies(shared_data):
    folder = shared_data / "genomics" / "ienhancer"

    def codes(name):
        read = read_records(str(folder / name), DataSection(duplicate_ids="number")).records
        return [DNA.encode(record.sequence, record.where) for record in read]

    train = codes("enhancer.cv.txt") + codes("non.cv.txt")
    assert find_leaks(train, codes("enhancer.ind.txt"), DNA, 0.5).copied.sum() == 100
    assert find_leaks(train, codes("non.ind.txt"), DNA, 0.5).copied.sum() == 0
