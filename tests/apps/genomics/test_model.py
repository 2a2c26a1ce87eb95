"""What must not change an answer: padding, the batch around it, the strand; and what must."""

import numpy as np
import pytest
import torch

from apps.genomics.alphabet import DNA
from apps.genomics.items import padded
from apps.genomics.model import Letters
from apps.genomics.strand import flipped, other_strand
from apps.genomics.tokens import Tokens
from core.attention.registry import available, variant_class
from core.training.errors import UserError

BOTH_WAYS = [name for name in available() if "bidirectional" in variant_class(name).can and name != "auto"]


@pytest.fixture(scope="module")
def table(tmp_path_factory, letters):
    path = tmp_path_factory.mktemp("model") / "x.csv"
    texts = letters(60, [20 + n % 9 for n in range(60)])
    rows = [f"{text},{'ab'[n % 2]},{n % 7}.5" for n, text in enumerate(texts)]
    path.write_text("sequence,label,value\n" + "\n".join(rows) + "\n")
    return path


@pytest.fixture(scope="module")
def per_base(tmp_path_factory, letters):
    folder = tmp_path_factory.mktemp("bases")
    texts = letters(40, [20 + n % 9 for n in range(40)])
    (folder / "x.fa").write_text("".join(f">s{n}\n{text}\n" for n, text in enumerate(texts)))
    labels = [text.translate(str.maketrans("ACGT", "+..-")) for text in texts]
    (folder / "l.fa").write_text("".join(f">s{n}\n{text}\n" for n, text in enumerate(labels)))
    return {"path": str(folder / "x.fa"), "labels_path": str(folder / "l.fa")}


def test_an_ambiguous_letter_is_the_mean_of_what_it_may_be():
    torch.manual_seed(0)
    embed = Letters(Tokens(DNA, "char"), 8)
    vectors = {letter: embed(torch.tensor(code)) for code, letter in enumerate(DNA.letters)}
    assert torch.allclose(vectors["R"], (vectors["A"] + vectors["G"]) / 2, atol=1e-6)
    assert torch.allclose(vectors["N"], (vectors["A"] + vectors["C"] + vectors["G"] + vectors["T"]) / 4, atol=1e-6)


def test_the_other_strand_of_a_padded_batch():
    ids, mask = padded([DNA.encode("AACGT", "x"), DNA.encode("CCA", "x")])
    turned = other_strand(ids, mask, torch.arange(17).index_copy(0, torch.arange(4), torch.tensor([3, 2, 1, 0])))
    assert DNA.decode(turned[0].numpy().astype(np.uint8)) == "ACGTT"
    assert DNA.decode(turned[1, :3].numpy().astype(np.uint8)) == "TGG"
    assert turned[1, 3:].tolist() == ids[1, 3:].tolist()
    assert torch.equal(flipped(flipped(ids, mask), mask), ids)


@pytest.mark.parametrize("variant", BOTH_WAYS)
def test_padding_changes_no_answer_and_no_gradient(table, built, variant):
    _, data, task = built("classification", {"path": str(table)}, {"stem": [5]}, [f"attention={variant}"])
    together = data.val.__getitems__(range(4))
    assert not together["mask"].all()
    # Projections of linformer and buckets of reformer count positions, which padding moves.
    tolerance = 1e-3 if variant in ("linformer", "reformer") else 2e-5
    answers = task.answer(together)
    answers.sum().backward()
    gradient = task.model.embed.weight.grad.clone()
    task.zero_grad()
    alone = torch.cat([task.answer(data.val.__getitems__([n])) for n in range(4)])
    alone.sum().backward()
    assert torch.allclose(answers, alone, atol=tolerance), (answers - alone).abs().max()
    assert torch.allclose(gradient, task.model.embed.weight.grad, atol=30 * tolerance)


@pytest.mark.parametrize("pool", ["mean", "max", "attend"])
@pytest.mark.parametrize("strand", ["average", "tied"])
@pytest.mark.parametrize("tokens", ["char", "kmer:3", "kmer:3:3", "bpe:64"])
def test_both_strands_have_one_score(table, built, pool, strand, tokens):
    model = {"strand": strand, "pool": pool, "stem": [4]}
    if tokens == "char":
        model["shortcut"] = "kmer:2"
    recipe, _, task = built("classification", {"path": str(table), "tokens": tokens}, model)
    texts = [DNA.encode(text, "x") for text in ("ACGGATTACCAGATTAC", "NRACCAGTTTG", "GATTACA")]

    def score(sequences):
        coder = task.model.tokens
        ids, mask = padded([coder.encode(one) for one in sequences])
        other = padded([coder.encode(DNA.reverse_complement(one)) for one in sequences])
        batch = {"ids": ids, "mask": mask}
        if tokens != "char":
            batch |= {"other_ids": other[0], "other_mask": other[1]}
        return task.answer(batch)

    ours, theirs = score(texts), score([DNA.reverse_complement(one) for one in texts])
    assert torch.allclose(ours, theirs, atol=1e-5), (ours - theirs).abs().max()
    assert not torch.allclose(ours[0], ours[1], atol=1e-3)
    recipe.model.strand = "none"
    task.model.strand = "none"
    if strand == "average":  # without the mean the strands differ, or the test above would prove nothing
        assert not torch.allclose(score(texts), score([DNA.reverse_complement(t) for t in texts]), atol=1e-3)


@pytest.mark.parametrize("strand", ["average", "tied"])
def test_answers_per_base_are_mirrored_and_strand_classes_change_places(per_base, built, strand):
    model = {"strand": strand, "stem": [4], "shortcut": "window:5"}
    _, data, task = built("tokens", per_base, model)
    assert data.spec["names"] == ["+", "-", "."]
    assert data.spec["mirror"] == [1, 0, 2]
    ids, mask = padded([DNA.encode("ACGGATTACCAGATTAC", "x"), DNA.encode("GGCATTA", "x")])
    turned = other_strand(ids, mask, task.model.complement)
    ours, theirs = task.answer({"ids": ids, "mask": mask}), task.answer({"ids": turned, "mask": mask})
    back = flipped(theirs, mask)[..., [1, 0, 2]]
    assert torch.allclose(ours[mask], back[mask], atol=1e-5)
    assert not torch.allclose(ours[mask], flipped(theirs, mask)[mask], atol=1e-2), "the classes have to change places"


@pytest.mark.parametrize("strand", ["average", "tied"])
def test_a_masked_model_fills_in_the_complement_on_the_other_strand(per_base, built, strand):
    _, _, task = built("masked", {"path": per_base["path"]}, {"strand": strand, "stem": [4]})
    ids, mask = padded([DNA.encode("ACGGATTACCAGATTAC", "x"), DNA.encode("GGCATTA", "x")])
    ids[0, 5] = ids[1, 2] = task.model.tokens.mask
    turned = other_strand(ids, mask, task.model.complement)
    back = flipped(task.model(turned, mask), mask)[..., [3, 2, 1, 0]]
    ours = task.model(ids, mask)
    assert torch.allclose(ours[mask], back[mask], atol=1e-5)
    assert not torch.allclose(ours[mask], flipped(task.model(turned, mask), mask)[mask], atol=1e-2)


def test_augmentation_reads_either_strand_in_training_and_the_given_one_after(table, built):
    _, data, task = built("classification", {"path": str(table)}, {"strand": "augment"})
    batch = data.val.__getitems__([0])
    plain = task.model.answer(batch["ids"], batch["mask"])
    other = task.model.answer(other_strand(batch["ids"], batch["mask"], task.model.complement), batch["mask"])
    assert torch.equal(task.answer(batch), plain.float())
    task.train()
    seen = [task.answer(batch) for _ in range(20)]
    hits = [torch.allclose(one, plain, atol=1e-6) for one in seen]
    assert all(hit or torch.allclose(one, other, atol=1e-6) for hit, one in zip(hits, seen))
    assert 3 < sum(hits) < 17


def test_augmentation_of_bases_gives_answers_in_the_direction_of_the_labels(per_base, built):
    _, _, task = built("tokens", per_base, {"strand": "augment", "shortcut": "window:3"})
    # The label of a base is its letter, which the window model knows: on either strand the answer must be right.
    with torch.no_grad():
        task.model.head.weight.zero_()
        task.model.head.bias.zero_()
    task.train()
    ids, mask = padded([DNA.encode("ACGGATTACCAGATTAC", "x")] * 8)
    right = torch.tensor([["+", "-", "."].index({"A": "+", "T": "-"}.get(c, ".")) for c in "ACGGATTACCAGATTAC"])
    assert (task.answer({"ids": ids, "mask": mask}).argmax(-1) == right).all()


@pytest.mark.parametrize("shortcut", ["position", "kmer:3+length", "position:2+last:5"])
def test_training_starts_at_the_fit_of_the_shortcut(tmp_path, letters, recipe, shortcut):
    from apps.genomics import linear
    from apps.genomics.data import build_data
    from apps.genomics.task import build_task
    from apps.genomics.terms import feature_matrix
    from apps.genomics.words import shortcut_terms

    texts = letters(120, 24)
    labels = ["yes" if text.count("AC") > 1 else "no" for text in texts]
    (tmp_path / "x.csv").write_text("sequence,label\n" + "\n".join(map(",".join, zip(texts, labels))))
    made = recipe("classification", {"path": str(tmp_path / "x.csv")}, {"shortcut": shortcut, "shortcut_strength": 0.1})
    data = build_data(made)
    task = build_task(made, data.spec).eval()
    terms = shortcut_terms(shortcut)
    x = feature_matrix(terms, data.train.sequences, DNA)
    weights, bias = linear.fit_classes(x, np.array(data.train.targets), 2, 0.1)
    wanted = feature_matrix(terms, data.val.sequences, DNA) @ weights + bias
    found = task.answer(data.val.__getitems__(range(len(data.val)))).detach().numpy()
    assert np.allclose(found, wanted, atol=1e-4)
    assert np.ptp(wanted) > 0.5


def test_a_frozen_shortcut_stays_at_its_fit_and_the_rest_learns(tmp_path, letters, recipe):
    from apps.genomics.data import build_data
    from apps.genomics.task import build_task

    texts = letters(120, 24)
    (tmp_path / "x.csv").write_text("sequence,label\n" + "\n".join(f"{t},{t.count('AC') > 1}" for t in texts))
    for frozen in (True, False):
        model = {"shortcut": "kmer:2+length", "shortcut_frozen": frozen}
        made = recipe("classification", {"path": str(tmp_path / "x.csv")}, model)
        data = build_data(made)
        task = build_task(made, data.spec)
        task.loss(data.train.__getitems__(range(20)))[0].backward()
        assert task.model.head.weight.grad.abs().sum() > 0
        assert (task.model.shortcut.weight.grad is None) == frozen


def test_hidden_letters_are_hidden_from_the_network_alone_and_in_training_alone(table, built):
    data = {"path": str(table)}
    _, parts, task = built("classification", data, {"shortcut": "kmer:2", "hidden_share": 0.5})
    seen = []
    task.model.embed.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    task.model.shortcut.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    batch = parts.train.__getitems__(range(8))
    task.answer(batch)
    assert torch.equal(seen[0], batch["ids"])
    seen.clear()
    task.train()
    task.answer(batch)
    hidden = seen[0] == task.model.tokens.mask
    assert 0.3 < hidden.float().mean() < 0.7
    assert torch.equal(seen[0][~hidden], batch["ids"][~hidden])
    assert torch.equal(seen[1], batch["ids"])


def test_a_pool_that_needs_one_length_is_refused_where_lengths_differ(table, recipe):
    from apps.genomics.data import build_data
    from apps.genomics.task import build_task

    made = recipe("classification", {"path": str(table)}, {"pool": "flat"})
    with pytest.raises(ValueError, match="pool=flat needs sequences of one length"):
        build_task(made, build_data(made).spec)
    with pytest.raises(UserError, match="shortcut=length\\+position:2 needs sequences of one length"):
        build_data(recipe("classification", {"path": str(table)}, {"shortcut": "length+position:2"}))
