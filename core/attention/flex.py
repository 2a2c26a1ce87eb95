"""The `flex` backend: torch's flex-attention under a variant's pattern of keys, for CUDA.

A pattern says whether the query at i sees the key at j; it stands once, in the variant's file, and the reference reads
it too. From it come the blocks of 128 x 128 scores that are computed at all, built once per shape and device and kept;
inside a block that is seen in part it is asked again, pair by pair. A key mask, which changes with the batch, and ALiBi
change the scores, so that nothing is built anew for them.

The kernel is torch's, compiled by torch at the first call of a pattern, once more at a second length, then no more. It
cannot stand inside another compiled graph: torch.compile breaks the graph around it, and fullgraph=True is an error.

No GPU has tried it (2026-11-25): values and gradients are tested on a CPU by torch's own unfused form of the same
operation. So it runs where it is asked for, by `backend="flex"` or `set_backend("flex", mechanism)`.

Source:
    Dong et al. 2024 (Flex Attention), arXiv:2412.05496
"""

from collections.abc import Callable
from functools import cache, lru_cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

from core.attention.blocked import block_elements
from core.attention.contract import Attended, Sees, accumulator

BLOCK = 128
"""Side of a block of scores, torch's default."""

COMPILATIONS = 1024
"""Most compiled forms of the kernel in a process: patterns, dtypes, with and without gradient, one and several lengths.
torch's own limit of 8 is a layout of two patterns, and what lies behind it is an error."""


@torch.compiler.disable(reason="flex-attention compiles itself and cannot stand inside another graph")
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Callable[..., Sees],
    numbers: tuple,
    *,
    causal: bool,
    key_mask: Tensor | None = None,
    slopes: Tensor | None = None,
    scale: float,
    by_head: bool = False,
) -> Attended:
    """Softmax over the keys that a pattern shows, with its mass.

    Args:
        q: [B, H, L, D].   k: [B, K, M, D].   v: [B, K, M, E]; masked rows of k and v hold finite numbers.
        pattern: `pattern(*numbers)` says which key a query sees; a function of a module, and numbers that can be
            hashed, because what is built from them is kept.
        causal: bottom-right aligned.   key_mask: [B, M], True where a key is real.   slopes: [H], ALiBi.
        scale: factor of the scores.
        by_head: the heads see different keys.
    """
    if 0 in (*q.shape, k.shape[2], v.shape[3]):
        mass = torch.full(q.shape[:3], -torch.inf, dtype=accumulator(q.dtype), device=q.device)
        return Attended(v.new_zeros(*q.shape[:3], v.shape[3]), mass)
    heads, ahead = q.shape[1] if by_head else 1, k.shape[2] - q.shape[2]
    mask = block_mask(pattern, numbers, heads, q.shape[2], k.shape[2], causal, q.device)
    penalty = None if slopes is None else slopes.to(accumulator(q.dtype))
    shift = torch.tensor(ahead, dtype=torch.int32, device=q.device)

    def changed(score, b, h, i, j):
        if penalty is not None:
            score = score - penalty[h] * (i + shift - j).abs()
        return score if key_mask is None else torch.where(key_mask[b, j], score, -torch.inf)

    kind = torch.promote_types(q.dtype, torch.promote_types(k.dtype, v.dtype))
    with torch._dynamo.config.patch(recompile_limit=COMPILATIONS, accumulated_recompile_limit=COMPILATIONS):
        out, more = _kernel()(
            *(x.to(kind) for x in (q, k, v)),
            score_mod=None if penalty is None and key_mask is None else changed,
            block_mask=mask,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
            return_aux=AuxRequest(lse=True),
        )
    return Attended(out.to(v.dtype), more.lse)


@cache
def _kernel() -> Callable:
    # fullgraph: beyond a limit torch would else go on, with one warning, by the form that keeps all L x M scores.
    return torch.compile(flex_attention, fullgraph=True)


@lru_cache(maxsize=64)
def block_mask(
    pattern: Callable[..., Sees],
    numbers: tuple,
    heads: int,
    queries: int,
    keys: int,
    causal: bool,
    device: torch.device,
) -> BlockMask:
    """Which blocks of scores are seen, and which of them in full; kept for the 64 latest shapes.

    Built in strips of rows, so that memory stays near that of a block of `blocked` however long the sequence; time
    grows like L M, once per shape.
    """
    # Made under inference mode (a validation pass), its tensors could not serve a later training step.
    with torch.inference_mode(False), torch.no_grad():
        # As tensors, offsets are data of the compiled kernel; as numbers, each would be compiled anew.
        sees = pattern(*numbers)

        def seen_from(first: int) -> Callable:
            shift = torch.tensor(keys - queries + first, dtype=torch.int32, device=device)

            def seen(b, h, i, j):
                at = i + shift
                return sees(h, at, j) & (j <= at) if causal else sees(h, at, j)

            return seen

        rows = max(1, block_elements(device) // (heads * keys * BLOCK)) * BLOCK
        strips = [
            create_block_mask(seen_from(a), None, heads, min(rows, queries - a), keys, device, BLOCK)
            for a in range(0, queries, rows)
        ]
        names = "kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices"
        parts = [torch.cat([getattr(strip, name) for strip in strips], 2) for name in names]
        return BlockMask.from_kv_blocks(*parts, BLOCK_SIZE=BLOCK, mask_mod=seen_from(0), seq_lengths=(queries, keys))
