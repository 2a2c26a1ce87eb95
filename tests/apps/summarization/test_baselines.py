"""Floors and what they are made of: budgets, graphs, the oracle; and their known figures on the real files."""

from collections import defaultdict

import numpy as np
import pytest

from apps.summarization.baselines import SCORES, choose, floor_rows, oracle_choice
from apps.summarization.documents import Example, source_from_sentences
from apps.summarization.graphs import lexrank, likeness, textrank
from apps.summarization.oracle import greedy_oracle, oracle_labels, prepare_all, soft_labels
from apps.summarization.reading import Report, read_set
from apps.summarization.recipe import DataSection
from apps.summarization.rouge import Scorer, means
from apps.summarization.selection import Budget, lengths_of, select


def test_the_budget_is_kept_and_the_order_is_the_documents():
    scores = np.array([1.0, 5.0, 4.0, 3.0, 2.0])
    lengths = np.array([4, 2, 8, 5, 4])
    # The two words of sentence 1 are too few; 8 words fit into 10, then only one of at most 3 words would.
    assert select(scores, lengths, Budget(words=10)) == [2]
    assert select(scores, lengths, Budget(words=12)) == [2, 3]  # 13 words, up to 1.1 times the budget
    assert select(scores, lengths, Budget(words=11)) == [2, 4]  # 5 more would be 13, which is over 12.1
    assert select(scores, lengths, Budget(sentences=2)) == [2, 3]
    assert select(scores, lengths, Budget()) == [2, 3, 4]


def test_something_is_always_chosen():
    assert select(np.array([1.0, 2.0]), np.array([50, 40]), Budget(words=10)) == [1]
    assert select(np.array([1.0, 2.0]), np.array([1, 2]), Budget(words=10)) == [1]
    assert select(np.array([]), np.array([]), Budget(words=10)) == []


def test_redundancy_control_leaves_out_what_is_said_already():
    sentences = ["The ship sank in the storm.", "The ship sank in the big storm.", "Anna bought a farm."]
    scores = np.array([3.0, 2.9, 1.0])
    lengths = lengths_of(sentences)
    assert select(scores, lengths, Budget(sentences=2), likeness(sentences)) == [0, 1]
    assert select(scores, lengths, Budget(sentences=2, redundancy=0.6), likeness(sentences)) == [0, 2]


def dense_walk(weights):
    size = len(weights)
    degree = weights.sum(1)
    step = np.where(degree[:, None] > 0, weights / np.where(degree[:, None] > 0, degree[:, None], 1), 1 / size)
    google = 0.15 / size + 0.85 * step.T
    values, vectors = np.linalg.eig(google)
    top = np.abs(vectors[:, np.argmax(values.real)].real)
    return top / top.sum()


@pytest.fixture
def text():
    rng = np.random.default_rng(0)
    words = [f"word{i}" for i in range(40)]
    return [" ".join(rng.choice(words, 8)) for _ in range(25)] + ["alone here now"]


def test_lexrank_is_the_stationary_distribution_of_the_cosine_graph(text):
    graph = likeness(text).astype(np.float64)
    np.fill_diagonal(graph, 0)
    graph[graph < 1e-9] = 0
    np.testing.assert_allclose(lexrank(text), dense_walk(graph), atol=1e-5)


def test_textrank_is_that_of_shared_words_over_log_lengths(text):
    bags = [sentence.split() for sentence in text]
    size = len(text)
    common = {w for w in {w for bag in bags for w in bag} if sum(w in bag for bag in bags) >= size / 2}
    graph = np.zeros((size, size))
    for i in range(size):
        for j in range(size):
            if i != j:
                shared = len((set(bags[i]) & set(bags[j])) - common)
                graph[i, j] = shared / (np.log(len(bags[i])) + np.log(len(bags[j])))
    np.testing.assert_allclose(textrank(text), dense_walk(graph), atol=1e-5)


def test_the_oracle_takes_the_sentences_that_the_reference_repeats(text):
    reference = Scorer().prepare(f"{text[3]}\n{text[17]}")
    assert greedy_oracle(prepare_all(text), reference) == [3, 17]
    labels = oracle_labels(prepare_all(text), [reference, Scorer().prepare(text[3])])
    assert labels[3] == 1.0
    assert labels[17] == 0.5
    assert labels.sum() == 1.5


def test_soft_labels_are_largest_for_copied_sentences(text):
    worth = soft_labels(prepare_all(text), [Scorer().prepare(text[5])])
    assert worth.argmax() == 5
    assert worth[5] == pytest.approx(1.0)
    assert worth.min() >= 0


def test_floors_keep_the_budget_and_repeat_themselves(text):
    source = source_from_sentences("d", text)
    for name in SCORES:
        chosen = choose(name, source, Budget(words=30))
        assert 20 <= lengths_of(text)[chosen].sum() <= 33
        assert chosen == choose(name, source, Budget(words=30))
    assert choose("lead", source, Budget(words=30)) == [0, 1, 2, 3]


def test_the_oracle_is_above_every_floor(text):
    example = Example("d", source_from_sentences("d", text), None, (f"{text[3]} {text[20]}", text[9]))
    assert oracle_choice(example, Scorer()) in ([3, 20], [9])
    scores = {name: floor_rows(name, [example], Budget(words=16), Scorer())[0] for name in (*SCORES, "oracle")}
    assert all(scores["oracle"]["rouge2"] > scores[name]["rouge2"] for name in SCORES)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("data", "words", "wanted"),
    [
        ({"format": "squality"}, 230, {"lead": (31.34, 4.96), "textrank": (34.69, 5.82), "lexrank": (35.61, 6.58)}),
        (
            {"format": "squality", "questions": "plot"},
            430,
            {"lead": (39.75, 7.42), "textrank": (43.36, 8.57), "lexrank": (45.12, 9.75)},
        ),
        ({"format": "scisummnet", "min_words": 500}, 150, {"lead": (42.81, 18.08), "textrank": (37.44, 8.00)}),
    ],
)
def test_floors_reach_their_known_figures(shared_data, data, words, wanted):
    folder = shared_data / "summarization" / data["format"]
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent")
    examples = read_set(folder, DataSection.model_validate(data), defaultdict(Report))["test"]
    for name, figures in wanted.items():
        found = means(floor_rows(name, examples, Budget(words=words), Scorer()))
        assert (found["rouge1"], found["rouge2"]) == pytest.approx(figures, abs=1.0), name
