"""Matrices in a spec: plain JSON, and every bit back."""

import json

import torch

from core.training.matrices import pack, unpack


def test_packing_a_matrix_keeps_every_bit():
    matrix = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    packed = json.loads(json.dumps(pack(matrix)))
    assert isinstance(packed["float32"], str)
    assert torch.equal(unpack(packed), matrix)
    assert torch.equal(unpack(pack(matrix.numpy())), matrix)
