"""Packs: several sequences in one row give what each gives alone, whatever stands beside them."""

import pytest
import torch

from apps.genomics.alphabet import DNA
from apps.genomics.items import padded
from apps.genomics.packing import attention_padding, laid_out, offsets, padded_again
from core.attention.registry import available, variant_class
from core.training.errors import UserError

BOTH_WAYS = [name for name in available() if "bidirectional" in variant_class(name).can and name != "auto"]
LENGTHS = [1, 23, 7, 16, 17, 2]


@pytest.fixture(scope="module")
def ragged(tmp_path_factory, letters):
    path = tmp_path_factory.mktemp("packing") / "x.fa"
    texts = letters(40, [12 + n % 30 for n in range(40)])
    path.write_text("".join(f">s{n}\n{text}\n" for n, text in enumerate(texts)))
    labels = path.with_name("l.fa")
    labels.write_text(path.read_text().translate(str.maketrans("ACGT", "+..-")))
    return {"path": str(path), "labels_path": str(labels)}


def batch(letters, seed=1):
    return padded([DNA.encode(text, "x") for text in letters(len(LENGTHS), LENGTHS, seed=seed)])


def test_a_row_holds_the_sequences_with_gaps_between_them():
    ids, mask = padded([DNA.encode("ACG", "x"), DNA.encode("T", "x")])
    row, real = laid_out(ids + 1, mask, 2)
    assert (row * real).tolist() == [[1, 2, 3, 0, 0, 4, 0, 0]]
    assert real.tolist() == [[True] * 3 + [False] * 2 + [True, False, False]]
    assert row[real].tolist() == [1, 2, 3, 4]
    assert offsets(mask).tolist() == [0, 3, 4]
    again = padded_again(row[:, real[0]].unsqueeze(-1), mask)
    assert again.squeeze(-1).tolist() == [[1, 2, 3], [4, 0, 0]]


@pytest.mark.parametrize("variant", BOTH_WAYS)
def test_packed_and_padded_give_the_same_answers_and_gradients(ragged, built, letters, variant):
    _, _, task = built("tokens", ragged, {"stem": [5, 4]}, [f"attention={variant}", "data.packing=true"])
    ids, mask = batch(letters)
    found = []
    for packing in (True, False):
        task.model.packing = packing
        task.zero_grad()
        answers = task.model(ids, mask)[mask]
        answers.square().sum().backward()
        found.append((answers.detach(), task.model.embed.weight.grad.clone()))
    # Projections of linformer and buckets of reformer count positions, which padding moves.
    tolerance = 1e-3 if variant in ("linformer", "reformer") else 2e-5
    (ours, slope), (theirs, other) = found
    assert torch.allclose(ours, theirs, atol=tolerance), (ours - theirs).abs().max()
    assert torch.allclose(slope, other, atol=100 * tolerance), (slope - other).abs().max()


@pytest.mark.parametrize("task", ["tokens", "causal"])
def test_no_letter_of_one_sequence_reaches_another(ragged, built, letters, task):
    data = {**ragged, "packing": True} if task == "tokens" else {"path": ragged["path"], "packing": True}
    _, _, made = built(task, data, {"stem": [9, 8]}, ["attention=gla"] if task == "causal" else [])
    ids, mask = batch(letters)
    other, _ = batch(letters, seed=2)
    changed = ids.clone()
    changed[1] = other[1]  # the second of the six is another sequence
    before, after = made.model(ids, mask), made.model(changed, mask)
    rest = [row for row in range(len(LENGTHS)) if row != 1]
    assert torch.equal(before[rest][mask[rest]], after[rest][mask[rest]])
    assert not torch.allclose(before[1], after[1], atol=1e-3)


@pytest.mark.parametrize("strand", ["average", "tied"])
def test_packs_are_read_on_both_strands(ragged, built, letters, strand):
    _, _, task = built("tokens", {**ragged, "packing": True}, {"strand": strand, "stem": [4]})
    ids, mask = batch(letters)
    packed = task.model(ids, mask)[mask]
    task.model.packing = False
    assert torch.allclose(packed, task.model(ids, mask)[mask], atol=1e-5)


def test_batches_are_drawn_regardless_of_length_and_the_share_of_padding_is_told(ragged, built):
    _, data, task = built("tokens", {**ragged, "packing": True})
    assert data.lengths is None
    assert data.summary["padding"].startswith("packed: none outside attention, ")
    loss, _ = task.loss(data.train.__getitems__(range(8)))
    assert loss.isfinite()
    assert attention_padding([8, 15, 16], [[0, 1, 2]]) == pytest.approx(1 - 39 / 46)
    assert attention_padding([8, 15, 16], [[0, 2], [1]]) == 0


def test_a_convolution_between_blocks_is_refused(ragged, recipe):
    with pytest.raises(UserError, match=r"backbone\.mlp=mix looks at neighbours"):
        recipe("tokens", {**ragged, "packing": True}, None, ["backbone.mlp=mix"])
