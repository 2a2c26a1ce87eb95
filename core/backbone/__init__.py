"""Stacks of attention layers: `Encoder` (bidirectional or causal) and `Decoder` (with cross-attention).

block.py    one pre-norm layer: attention, optional cross-attention, MLP
mlp.py      the MLPs: per position, or mixing neighbours by a convolution
stack.py    input positions, blocks by layout word, decoding states, recomputation, cost
"""

from core.backbone.block import Block
from core.backbone.mlp import MLP, MixMLP
from core.backbone.stack import Decoder, Encoder

__all__ = ["MLP", "Block", "Decoder", "Encoder", "MixMLP"]
