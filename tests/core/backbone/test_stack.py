"""Stacks: layouts, positions, decoding, recomputation, cost."""

import pytest
import torch

from core.attention.contract import state_bytes
from core.attention.variants.hard import reinforce_loss
from core.backbone import Decoder, Encoder
from core.layout import expand_layout

HYBRID = {"variant": "hybrid", "window": 3}


def test_a_layout_word_is_repeated_over_the_depth():
    letters = {"s": {"variant": "softmax"}, "l": {"variant": "linear", "feature_map": "relu"}}
    layers = expand_layout(letters, "lls", 5)
    assert [layer["variant"] for layer in layers] == ["linear", "linear", "softmax", "linear", "linear"]
    assert layers[0]["feature_map"] == "relu"
    assert [layer["variant"] for layer in expand_layout({}, "wh", 3)] == ["window", "hybrid", "window"]
    encoder = Encoder(16, 3, 2, letters, layout="ls")
    assert [block.attention.variant.name for block in encoder.blocks] == ["linear", "softmax", "linear"]


@pytest.mark.parametrize(
    ("attention", "layout", "message"),
    [
        ({}, "lx", "letter 'x' has no meaning; known letters: b, d, g, h, l, m, n, s, w"),
        ({"s": {"variant": "softmax"}}, None, "given per letter"),
        ({"variant": "linear"}, "ls", "mixes variants by letter"),
        ({"s": {"variant": "softmax"}}, "l", "does not use the letter 's'"),
        ({"l": {"variant": "linear", "feature_mop": 1}}, "l", "did you mean 'feature_map'"),
        ({}, "", "empty"),
    ],
)
def test_a_layout_that_means_nothing_is_refused(attention, layout, message):
    with pytest.raises(ValueError, match=message):
        expand_layout(attention, layout, 4)


@pytest.mark.parametrize("positions", [None, "sinusoidal", "learned", "rope", "alibi"])
def test_a_stack_decodes_masks_and_packs_like_one_pass(positions):
    encoder = Encoder(16, 2, 2, {}, layout="hs", causal=True, positions=positions, max_length=64).double().eval()
    x = torch.randn(2, 12, 16, dtype=torch.float64)
    want = encoder(x)
    states, got = encoder.init_state(2), []
    y, states = encoder.prefill(x[:, :7], states)
    got.append(y)
    for t in range(7, 12):
        y, states = encoder.step(x[:, t], states)
        got.append(y.unsqueeze(1))
    torch.testing.assert_close(torch.cat(got, 1), want)
    mask = torch.tensor([[True] * 12, [False] * 4 + [True] * 8])
    shifted = torch.cat((torch.randn(4, 16, dtype=torch.float64), x[1, :8]))[None]
    padded = encoder(torch.cat((x[:1], shifted)), key_mask=mask)
    torch.testing.assert_close(padded[1, 4:], encoder(x[1:, :8])[0])
    packed = encoder(x[:1], cu_seqlens=torch.tensor([0, 5, 5, 12]))
    torch.testing.assert_close(packed, torch.cat((encoder(x[:1, :5]), encoder(x[:1, 5:])), 1))


def test_learned_positions_say_where_they_end():
    encoder = Encoder(16, 1, 2, {"variant": "linear"}, causal=True, positions="learned", max_length=8)
    assert encoder(torch.randn(1, 20, 16)).shape == (1, 20, 16)
    with pytest.raises(ValueError, match="learned positions reach 8, this input needs 20"):
        encoder(torch.randn(1, 20, 16), key_mask=torch.ones(1, 20, dtype=torch.bool))
    with pytest.raises(ValueError, match="needs max_length"):
        Encoder(16, 1, 2, {"variant": "linear"}, positions="learned")
    with pytest.raises(ValueError, match=r"unknown positions 'sinusodal' \(did you mean 'sinusoidal'\?\)"):
        Encoder(16, 1, 2, {"variant": "linear"}, positions="sinusodal")


def test_recomputation_changes_memory_not_numbers():
    torch.manual_seed(0)
    plain = Encoder(16, 3, 2, HYBRID, dropout=0.2)
    saving = Encoder(16, 3, 2, HYBRID, dropout=0.2, checkpoint=True)
    saving.load_state_dict(plain.state_dict())
    x = torch.randn(2, 20, 16)
    gradients = []
    for encoder in (plain, saving):
        torch.manual_seed(3)
        encoder(x).square().sum().backward()
        gradients.append([p.grad for p in encoder.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


@pytest.mark.parametrize("variant", ["linear", "window", "hybrid"])
def test_recomputation_hands_out_each_saved_tensor_once(variant):
    encoder = Encoder(16, 2, 2, {"variant": variant}, checkpoint=True)
    x, mask = torch.randn(2, 9, 16), torch.arange(9) < torch.tensor([9, 5])[:, None]

    def gradients():
        return torch.autograd.grad(encoder(x, key_mask=mask).square().sum(), list(encoder.parameters()))

    recomputed = gradients()
    encoder.checkpoint = False
    for a, b in zip(recomputed, gradients()):
        torch.testing.assert_close(a, b)


def test_recomputation_draws_what_the_first_pass_drew():
    torch.manual_seed(3)
    plain = Encoder(16, 2, 2, {"variant": "hard"}).double()
    saving = Encoder(16, 2, 2, {"variant": "hard"}, checkpoint=True).double()
    saving.load_state_dict(plain.state_dict())
    x = torch.randn(2, 12, 16, dtype=torch.float64)
    for _ in range(2):
        gradients = []
        for encoder in (plain, saving):
            encoder.zero_grad()
            y = torch.cat((encoder(x), encoder(x + 1)))  # two passes before one backward
            y.sin().sum().backward()
            gradients.append([y, *(p.grad for p in encoder.parameters() if p.grad is not None)])
        assert len(gradients[0]) > 10
        for mine, theirs in zip(*gradients):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)
    for mine, theirs in zip(plain.buffers(), saving.buffers()):
        assert torch.equal(mine, theirs)


def test_recomputation_leaves_the_reinforce_loss_alone():
    found = []
    for checkpoint in (False, True):
        torch.manual_seed(3)
        encoder = Encoder(16, 2, 2, {"variant": "hard", "estimator": "reinforce"}, checkpoint=checkpoint).double()
        for _ in range(2):
            encoder.zero_grad()
            y = encoder(torch.ones(2, 6, 16, dtype=torch.float64).cumsum(1))
            (y.sin().sum() + reinforce_loss(encoder, y[:, 0, 0])).backward()
        found.append([p.grad for p in encoder.parameters()])
    for mine, theirs in zip(*found):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


def test_the_decoder_reads_its_context_and_decodes_stepwise():
    decoder = Decoder(16, 2, 2, HYBRID, cross={"variant": "linear"}, positions="sinusoidal").double().eval()
    x, context = torch.randn(2, 9, 16, dtype=torch.float64), torch.randn(2, 11, 16, dtype=torch.float64)
    mask = torch.ones(2, 11, dtype=torch.bool)
    mask[0, 6:] = False
    want = decoder(x, context, context_mask=mask)
    changed = context.clone()
    changed[0, 6:] += 5
    torch.testing.assert_close(decoder(x, changed, context_mask=mask), want)
    assert not torch.allclose(decoder(x, changed), decoder(x, context))
    states, got = decoder.init_state(2), []
    for t in range(9):
        y, states = decoder.step(x[:, t], states, context, mask)
        got.append(y)
    torch.testing.assert_close(torch.stack(got, 1), want)
    with pytest.raises(ValueError, match="cannot do 'cross'"):
        Decoder(16, 1, 2, HYBRID, cross={"variant": "window"})


@pytest.mark.parametrize("variant", ["linear", "softmax"])
def test_the_decoder_remembers_its_context(variant):
    arguments = {"cross": {"variant": variant}, "positions": "sinusoidal", "qk_norm": True, "num_kv_heads": 1}
    decoder = Decoder(16, 2, 2, {"variant": "linear"}, **arguments).double().eval()
    x, context = torch.randn(2, 9, 16, dtype=torch.float64), torch.randn(2, 11, 16, dtype=torch.float64)
    mask = torch.ones(2, 11, dtype=torch.bool)
    mask[0, 6:] = False
    junk = torch.where(mask[..., None], context, torch.nan)
    want = decoder(x, context, context_mask=mask)
    first = states = decoder.init_state(2, junk, mask)
    y, states = decoder.prefill(x[:, :4], states)
    got = [y]
    for t in range(4, 9):
        y, states = decoder.step(x[:, t], states)
        got.append(y.unsqueeze(1))
    torch.testing.assert_close(torch.cat(got, 1), want)
    torch.testing.assert_close(decoder.prefill(x[:, :4], first)[0], want[:, :4])
    with pytest.raises(ValueError, match="not both"):
        decoder.step(x[:, 0], states, context)
    with pytest.raises(ValueError, match="needs a context"):
        decoder.step(x[:, 0], decoder.init_state(2))


def test_a_linear_decoders_state_grows_neither_with_the_text_nor_with_its_context():
    decoder = Decoder(16, 2, 2, {"variant": "linear"}, cross={"variant": "linear"}).eval()
    cached = Decoder(16, 2, 2, {"variant": "linear"}, cross={"variant": "softmax"}).eval()

    def size(decoder, length, context):
        states = decoder.init_state(1, torch.randn(1, context, 16))
        _, states = decoder.prefill(torch.randn(1, length, 16), states)
        return sum(state_bytes(state) for state in states)

    assert size(decoder, 1, 5) == size(decoder, 300, 700)
    assert size(cached, 1, 5) == size(cached, 300, 5) < size(cached, 1, 700)


def test_a_stack_without_cross_attention_has_nothing_to_remember():
    with pytest.raises(ValueError, match="no cross-attention to remember"):
        Encoder(16, 1, 2, HYBRID, causal=True).blocks[0].remember(torch.zeros(1, 3, 16))


def test_layerwise_projections_are_one_parameter_of_the_stack():
    linformer = {"variant": "linformer", "rank": 4, "max_length": 12}
    tied = Encoder(16, 3, 2, {**linformer, "sharing": "layerwise"})
    own = Encoder(16, 3, 2, {**linformer, "sharing": "key_value"})
    assert len({id(block.attention.variant.mix) for block in tied}) == 1
    count = sum(p.numel() for p in tied.parameters())
    assert count == sum(p.numel() for p in own.parameters()) - 2 * 4 * 12 == tied.cost(1, 8).parameters
    tied(torch.randn(1, 8, 16)).square().sum().backward()
    mixed = tied.blocks[2].attention.variant.mix
    assert mixed.grad is not None
    assert mixed.grad[:, :8].any()
    assert not mixed.grad[:, 8:].any()
    again = Encoder(16, 3, 2, {**linformer, "sharing": "layerwise"})
    again.load_state_dict(tied.state_dict())
    assert torch.equal(again.blocks[0].attention.variant.mix, again.blocks[2].attention.variant.mix)
    different = {"a": {**linformer, "sharing": "layerwise"}, "b": {**linformer, "sharing": "layerwise", "rank": 5}}
    with pytest.raises(ValueError, match=r"share .mix. and must agree on its shape, got \[4, 12\] and \[5, 12\]"):
        Encoder(16, 2, 2, different, layout="ab")


def test_cost_adds_up():
    encoder = Encoder(16, 3, 2, HYBRID, causal=True, positions="learned", max_length=32)
    cost = encoder.cost(2, 20)
    assert cost.parameters == sum(p.numel() for p in encoder.parameters())
    one = encoder.blocks[0].attention.cost(2, 20)
    assert cost.flops == 3 * (one.flops + 4 * 2 * 20 * 16 * 64)
    assert cost.state_bytes == 3 * one.state_bytes


def test_global_tokens_reach_the_layers_that_take_them():
    attention = {"s": {"variant": "softmax"}, "f": {"variant": "longformer", "window": 2, "global_tokens": 0}}
    encoder = Encoder(16, 2, 2, attention, layout="fs").eval()
    x = torch.randn(1, 12, 16)
    marked = torch.zeros(1, 12, dtype=torch.bool)
    marked[:, 9] = True
    assert not torch.allclose(encoder(x, global_mask=marked), encoder(x))
    with pytest.raises(ValueError, match="global_mask: no layer here takes global tokens; longformer does"):
        Encoder(16, 2, 2, {"variant": "softmax"})(x, global_mask=marked)


def test_a_variant_that_can_only_cross_is_refused_as_self_attention_when_built():
    with pytest.raises(ValueError, match="attention 'hepos' cannot do 'bidirectional'"):
        Encoder(16, 1, 4, {"variant": "hepos"})
    Decoder(16, 1, 4, {"variant": "softmax"}, cross={"variant": "hepos"})
