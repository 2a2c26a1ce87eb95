r"""BigBird: blocks of positions that see their neighbours, the two ends, and a few random blocks.

    row block a sees the blocks a - (window - 1)/2 .. a + (window - 1)/2, the first, the last, and `random` others;
    the first and the last row block see everything;  all with j <= i if causal

where a query sees a block, it sees all its keys. Time and memory are linear in the length: a query sees
(window + 2 + random) block keys. Sequences of fewer than window + 2 + 2 random blocks are read in full.

Each head draws its own random blocks, causal ones among the earlier blocks. The draw is a pure function of the seed,
the head, the row block and the number of blocks: nothing is stored, training and evaluation see the same pattern, and
`seed` in the recipe is all that another machine needs. Layers of one seed share it; a layout gives each its own.

Source:
    Zaheer et al. 2020, arXiv:2007.14062

Where we differ:
    The published code draws with the global generator of the process, a new pattern for each build of the model. It has
    no causal form; ours drops the keys ahead and draws among the blocks before the window.
"""

import torch

from core.attention.backends import FLEX, implementation, resolve
from core.attention.blocked.tables import is_short, plan, table_forward
from core.attention.contract import (
    NO_INPUTS,
    Attended,
    Cost,
    Heads,
    Sees,
    Variant,
    check_inputs,
    check_whole,
    hide,
    repeat_heads,
    visible,
)
from core.attention.registry import register
from core.attention.variants import softmax


def listed(block: int, near: int, random: int, seed: int, causal: bool, heads: int, length: int, device) -> Sees:
    """The pattern of a sequence of this length; it tells the heads apart."""
    if is_short(length, block, near, random):
        return lambda head, i, j: torch.ones_like(i + j, dtype=torch.bool)
    last = -(-length // block) - 1
    table = plan(heads, last + 1, near, random, seed, causal, device)

    def sees(head, i, j):
        row, column = i // block, j // block
        seen = (row == 0) | (row == last)
        for n in range(table.shape[2]):  # no reduction: flex-attention takes what acts on each pair alone
            seen = seen | (table[head, row, n] == column)
        return seen

    return sees


def reference(q, k, v, block, near, random, seed, causal, key_mask) -> Attended:
    """The definition: softmax under the dense pattern; k and v have as many heads as q."""
    sees = listed(block, near, random, seed, causal, q.shape[1], q.shape[2], q.device)
    given = {"sees": sees, "heads": q.shape[1], "causal": causal, "key_mask": key_mask, "device": q.device}
    return softmax.reference(q, k, v, visible(q.shape[2], q.shape[2], **given), q.shape[-1] ** -0.5)


@implementation("bigbird", "reference")
def _reference(q, k, v, block, near, random, seed, causal, key_mask) -> Attended:
    k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
    return reference(q, k, v, block, near, random, seed, causal, key_mask)


@implementation("bigbird", "torch")
def _torch(q, k, v, block, near, random, seed, causal, key_mask) -> Attended:
    scale = q.shape[-1] ** -0.5
    return Attended(*table_forward(q, k, v, key_mask, block, near, random, seed, causal, scale))


@implementation("bigbird", "flex", **FLEX)
def _flex(q, k, v, block, near, random, seed, causal, key_mask) -> Attended:
    from core.attention import flex

    numbers = block, near, random, seed, causal, *q.shape[1:3], q.device
    given = {"causal": causal, "key_mask": key_mask, "scale": q.shape[-1] ** -0.5, "by_head": True}
    return flex.attend(q, k, v, listed, numbers, **given)


@register(
    "bigbird",
    summary="softmax over neighbouring, outer and random blocks; linear",
    source="Zaheer et al. 2020, arXiv:2007.14062",
    pick="documents, without knowing which tokens are special",
    stability="as softmax, over gathered blocks",
)
class BigBirdAttention(Variant):
    """Softmax over the own and neighbouring blocks, the first and last, and random ones.

    Args:
        block: positions per block.
        window: neighbouring blocks, the own one included; odd.
        random: random blocks per row block and head.
        seed: of the random blocks.
    """

    can = frozenset({"causal", "bidirectional", "mass"})
    positions = frozenset({"rope"})
    anchor = "length"

    def __init__(self, heads: Heads, *, block: int = 64, window: int = 3, random: int = 3, seed: int = 0):
        super().__init__(heads)
        check_whole("block", block)
        check_whole("window", window, what=" (blocks)")
        check_whole("random", random, 0)
        check_whole("seed", seed, 0)
        if window % 2 == 0:
            raise ValueError(f"window counts blocks around the own one and must be odd, got {window}")
        self.block, self.near, self.random, self.seed = block, window // 2, random, seed

    def forward(
        self,
        q,
        k,
        v,
        *,
        causal=False,
        key_mask=None,
        rotary=None,
        slopes=None,
        dropout=0.0,
        return_mass=False,
        backend="auto",
        inputs=NO_INPUTS,
    ) -> Attended:
        check_inputs(q, k, v, key_mask)
        if q.shape[2] != k.shape[2]:
            raise ValueError(f"bigbird needs as many queries as keys, got L={q.shape[2]}, M={k.shape[2]}")
        if rotary is not None:
            q, k = rotary[0](q), rotary[1](k)
        choice = resolve("bigbird", backend, q.device.type, q.dtype, (), (q.shape[3], v.shape[3]))
        pattern = self.block, self.near, self.random, self.seed, causal
        return choice.run(q, hide(k, key_mask), hide(v, key_mask), *pattern, key_mask)

    def cost(self, batch, length, keys=None, *, causal=False, positions=None, element_bytes=4) -> Cost:
        h = self.heads
        return Cost(
            flops=2 * batch * self.pairs(length, causal) * (h.width + h.value_width),
            bytes_moved=batch * element_bytes * (h.query + h.key) * length * (h.width + h.value_width),
        )

    def pairs(self, length: int, causal: bool) -> int:
        """Number of visible (query, key) pairs of all heads."""
        heads, blocks = self.heads.query, -(-length // self.block)
        if is_short(length, self.block, self.near, self.random):
            return heads * (length * (length + 1) // 2 if causal else length**2)
        table = plan(heads, blocks, self.near, self.random, self.seed, causal)[:, 1:-1]
        rest = length - (blocks - 1) * self.block  # positions in the last block
        row = torch.arange(1, blocks - 1)[None, :, None]
        if not causal:
            whole = int(((table >= 0) & (table < blocks - 1)).sum())
            last = int((table == blocks - 1).sum())
            inner = self.block * (whole * self.block + last * rest)
            return inner + heads * length * (self.block + rest)
        earlier, own = int(((table >= 0) & (table < row)).sum()), int((table == row).sum())
        inner = earlier * self.block**2 + own * self.block * (self.block + 1) // 2
        first = self.block * (self.block + 1) // 2
        return inner + heads * (first + rest * (length - rest) + rest * (rest + 1) // 2)
