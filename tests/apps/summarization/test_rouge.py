"""The scorer: published outputs, torchmetrics where it is exact, and a plain dynamic program for Lsum."""

import random

import pytest
from torchmetrics.functional.text.rouge import rouge_score

from apps.summarization.rouge import Scorer, bootstrap, subsequence


@pytest.fixture
def published(shared_data):
    folder = shared_data / "summarization" / "rouge_conformance"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent")
    predictions, references = ((folder / f"{name}.txt").read_text().splitlines() for name in ("preds", "refs"))
    return predictions, [[reference] for reference in references]


@pytest.mark.parametrize(
    ("stemming", "wanted"),
    [
        (True, {"rouge1": 36.09, "rouge2": 11.37, "rougeLsum": 31.26, "rougeL": 22.37}),
        (False, {"rouge1": 34.41, "rouge2": 10.77, "rougeLsum": 30.02, "rougeL": 21.61}),
    ],
)
def test_published_outputs_get_their_published_scores(published, stemming, wanted):
    found = Scorer(stemming=stemming).corpus(*published)
    assert found == pytest.approx(wanted, abs=0.02)


def test_torchmetrics_agrees_where_it_needs_no_download(published):
    predictions, references = (part[:40] for part in published)
    for prediction, (reference,) in zip(predictions, references):
        theirs = rouge_score(prediction, reference, use_stemmer=True, rouge_keys=("rouge1", "rouge2", "rougeL"))
        ours = Scorer().score(prediction, [reference])
        for metric in ("rouge1", "rouge2", "rougeL"):
            assert ours[metric] == pytest.approx(float(theirs[f"{metric}_fmeasure"]), abs=1e-6)


def plain_table(candidate, reference):
    table = [[0] * (len(candidate) + 1) for _ in range(len(reference) + 1)]
    for i, a in enumerate(reference):
        for j, b in enumerate(candidate):
            table[i + 1][j + 1] = table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
    return table


def plain_union(candidates, reference):
    """Places of the reference on a subsequence with any candidate, by the table and the usual way back through it."""
    union = set()
    for candidate in candidates:
        table, i, j = plain_table(candidate, reference), len(reference), len(candidate)
        while i and j:
            if reference[i - 1] == candidate[j - 1]:
                union.add(i - 1)
                i, j = i - 1, j - 1
            elif table[i][j - 1] > table[i - 1][j]:
                j -= 1
            else:
                i -= 1
    return union


def test_the_bits_give_what_the_table_gives():
    rng = random.Random(0)
    for _ in range(200):
        candidate, reference = (rng.choices("abcde", k=rng.randint(1, 90)) for _ in range(2))
        assert subsequence(candidate, reference) == plain_table(candidate, reference)[-1][-1]


def test_lsum_takes_the_union_over_sentences():
    rng = random.Random(1)
    scorer = Scorer(stemming=False)
    for _ in range(60):
        texts = [[rng.choices("abcdefgh", k=rng.randint(1, 12)) for _ in range(rng.randint(1, 4))] for _ in range(2)]
        candidate, reference = texts
        left = {w: sum(s.count(w) for s in candidate) for w in "abcdefgh"}
        asked = {w: sum(s.count(w) for s in reference) for w in "abcdefgh"}
        hits = 0
        for sentence in reference:
            for i in plain_union(candidate, sentence):
                word = sentence[i]
                if left[word] > 0 and asked[word] > 0:
                    hits, left[word], asked[word] = hits + 1, left[word] - 1, asked[word] - 1
        sizes = sum(map(len, candidate)) + sum(map(len, reference))
        prediction, wanted = ("\n".join(" ".join(s) for s in part) for part in texts)
        assert scorer.score(prediction, [wanted])["rougeLsum"] == pytest.approx(2 * hits / sizes)


def test_the_best_reference_counts_for_each_metric_alone():
    found = Scorer().score("a b c d", ["d c b a", "a b x y"])
    assert found["rouge1"] == 1.0  # of the first
    assert found["rouge2"] == pytest.approx(1 / 3)  # of the second


def test_other_scripts_need_other_tokens():
    assert Scorer().score("привет мир", ["привет мир"])["rouge1"] == 0.0
    assert Scorer(tokens="words").score("привет мир", ["привет мир"])["rouge1"] == 1.0
    assert Scorer(tokens="characters").score("世界", ["世人"])["rouge1"] == 0.5


def test_marks_of_pegasus_are_newlines():
    assert Scorer(splitter="newline").prepare("one two<n>three").sentences == [["one", "two"], ["three"]]


def test_empty_predictions_score_nothing_and_no_reference_is_an_error():
    assert set(Scorer().score("", ["a"]).values()) == {0.0}
    with pytest.raises(ValueError, match="at least one reference"):
        Scorer().score("a", [])


def test_the_interval_holds_the_mean_and_narrows_with_more_documents():
    rng = random.Random(0)
    few = [rng.random() for _ in range(20)]
    low, high = bootstrap(few)
    assert low < sum(few) / 20 < high
    many_low, many_high = bootstrap(few * 20)
    assert many_high - many_low < 0.5 * (high - low)
