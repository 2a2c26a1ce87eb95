"""The MLP that mixes neighbours: by hand, on a line and on a grid, padded, decoded, in stacks."""

import math

import pytest
import torch

from core.attention.contract import state_bytes
from core.backbone import Decoder, Encoder
from core.backbone.mlp import MixMLP


def by_hand(mlp, x, mask, grid):
    """x [L, C], one number at a time."""
    length = len(x)
    rows, columns = (1, length) if grid is None or mlp.causal else grid
    first = length - rows * columns
    wide = [mlp.outer.weight @ x[i] + mlp.outer.bias for i in range(length)]
    out = []
    for i in range(length):
        row, column = divmod(i - first, columns)
        y = torch.zeros_like(wide[0])
        for a in range(3):
            for b in range(3):
                up, left = row + a - 1, column + (b - 2 if mlp.causal else b - 1)
                at = first + up * columns + left
                if i < first and a == b == 1:
                    y += mlp.kernel[:, a, b] * wide[i]
                elif i >= first and 0 <= up < rows and 0 <= left < columns and mask[at]:
                    y += mlp.kernel[:, a, b] * wide[at]
        a, gate = (y + mlp.bias).chunk(2)
        out.append(mlp.inner.weight @ (a * gate / (1 + torch.exp(-gate))) + mlp.inner.bias)
    return torch.stack(out)


@pytest.mark.parametrize(("causal", "grid"), [(False, None), (False, (2, 4)), (True, None)])
def test_it_follows_its_formula(causal, grid):
    mlp = MixMLP(4, 6, causal=causal).double()
    with torch.no_grad():
        for parameter in mlp.parameters():
            parameter.copy_(torch.randn_like(parameter))
    x = torch.randn(2, 10, 4, dtype=torch.float64)
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[1, 4:7] = False
    dirty = x.masked_fill(~mask.unsqueeze(-1), math.nan)
    got, _ = mlp(dirty, mask, grid)
    for b in range(2):
        want = by_hand(mlp, x[b], mask[b], grid)
        torch.testing.assert_close(got[b][mask[b]], want[mask[b]], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("variant", ["linear", "relu_conv"])
def test_a_stack_with_it_decodes_and_ignores_padding(variant):
    encoder = Encoder(16, 2, 2, {"variant": variant}, causal=True, mlp="mix", mlp_dim=10).double().eval()
    x = torch.randn(2, 11, 16, dtype=torch.float64)
    want = encoder(x)
    states = encoder.init_state(2)
    assert encoder.cost(2, 11).state_bytes == sum(state_bytes(state) for state in states)
    assert encoder.cost(2, 11).parameters == sum(p.numel() for p in encoder.parameters())
    y, states = encoder.prefill(x[:, :6], states)
    parts = [y]
    for t in range(6, 11):
        y, states = encoder.step(x[:, t], states)
        parts.append(y.unsqueeze(1))
    torch.testing.assert_close(torch.cat(parts, 1), want)
    changed = x.clone()
    changed[:, 7:] += 1
    torch.testing.assert_close(encoder(changed)[:, :7], want[:, :7], rtol=0, atol=1e-12)


def test_a_grid_reaches_attention_and_mlp_and_padding_neither():
    encoder = Encoder(16, 2, 2, {"variant": "relu_conv"}, mlp="mix").double().eval()
    x = torch.randn(1, 12, 16, dtype=torch.float64)
    turned = x.view(1, 3, 4, 16).transpose(1, 2).flatten(1, 2)
    with torch.no_grad():  # symmetric kernels make the stack blind to a transposition of the image
        for name, parameter in encoder.named_parameters():
            if name.endswith("kernel"):
                parameter.copy_((parameter + parameter.mT) / 2)
    want = encoder(x, grid=(3, 4)).view(1, 3, 4, 16).transpose(1, 2).flatten(1, 2)
    torch.testing.assert_close(encoder(turned, grid=(4, 3)), want)
    assert not torch.allclose(encoder(turned), want)
    padded = torch.cat((torch.randn(1, 3, 16).double(), x, torch.randn(1, 5, 16).double()), 1)
    mask = torch.zeros(1, 20, dtype=torch.bool)
    mask[:, 3:15] = True
    torch.testing.assert_close(encoder(padded, key_mask=mask)[:, 3:15], encoder(x))


def test_it_compiles_whole():
    encoder = Encoder(16, 1, 2, {"variant": "linear"}, causal=True, mlp="mix")
    compiled = torch.compile(encoder, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (9, 30):
        x = torch.randn(2, length, 16)
        torch.testing.assert_close(compiled(x), encoder(x), rtol=1e-4, atol=1e-5)


def test_it_counts_its_products_and_refuses_packs():
    encoder = Encoder(16, 1, 2, {"variant": "linear"}, mlp="mix", mlp_dim=8)
    plain = Encoder(16, 1, 2, {"variant": "linear"}, mlp_dim=8)
    more = encoder.cost(2, 20).flops - plain.cost(2, 20).flops
    assert more == 2 * 2 * 20 * (16 * 8 + 16 * 3)  # twice the width before the gate, and 3 taps of it
    with pytest.raises(ValueError, match="mlp='mix' looks at neighbours"):
        encoder(torch.zeros(1, 6, 16), cu_seqlens=torch.tensor([0, 2, 6]))
    with pytest.raises(ValueError, match=r"unknown mlp 'mixed' \(did you mean 'mix'\?\); known: gelu, mix"):
        Encoder(16, 1, 2, {"variant": "linear"}, mlp="mixed")
    decoder = Decoder(16, 1, 2, {"variant": "linear"}, mlp="mix").double().eval()
    x, context = torch.randn(1, 7, 16).double(), torch.randn(1, 5, 16).double()
    states, parts = decoder.init_state(1), []
    for t in range(7):
        y, states = decoder.step(x[:, t], states, context)
        parts.append(y)
    torch.testing.assert_close(torch.stack(parts, 1), decoder(x, context))
