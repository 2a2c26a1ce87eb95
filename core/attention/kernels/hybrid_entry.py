"""From what the hybrid is given to what its kernel takes: features that are not the kernel's own, rotations, gate."""

from torch import Tensor

from core.attention.contract import Attended, hide
from core.attention.feature_projection import featured
from core.attention.kernels import hybrid
from core.attention.learned_maps import LearnedMap
from core.attention.packing import Pack


def by_one_kernel(q: Tensor, v: Tensor, tail_q: Tensor, phi, slopes: Tensor | None) -> bool:
    """Whether the hybrid of these queries, values and tails runs in one kernel (`hybrid.prefers`)."""
    tail = tail_q.shape[3] if phi.name == "taylor" else phi.width(tail_q.shape[3])
    phi = phi.given if isinstance(phi, LearnedMap) else phi
    return hybrid.prefers(phi, max(q.shape[3], tail, v.shape[3]), decays=slopes is not None)


def fused(
    q, k, v, tail_q, tail_k, window, phi, gate, causal, key_mask, scale, rotary, state: Tensor | None = None,
    keep=False, pack: Pack | None = None,
) -> tuple[Attended, Tensor]:  # fmt: skip
    """Both parts by one kernel, and the sums of the keys that left the window where they are to be kept."""
    same = tail_q is q and tail_k is k and rotary is None and not isinstance(phi, LearnedMap)
    tails, turned = (None, None), (None, None)
    level = None
    if not same:
        tail_q, tail_k, phi, turning, level = featured(tail_q, hide(tail_k, key_mask), phi, rotary)
        if turning is not None:
            features = phi.features(tail_q.float()), phi.features(tail_k.float())
            turned = tuple(turn(x).to(q.dtype) for turn, x in zip(turning, features))
        tails = tail_q.to(q.dtype), tail_k.to(q.dtype)
    if rotary is not None:
        q, k = rotary[0](q), rotary[1](k)
    weight = gate.float()[None, :, None].expand(q.shape[:3])
    weight = weight if level is None else weight + level
    packed = () if pack is None else (pack.offsets, pack.longest)
    out, mass, end = hybrid.hybrid_forward(
        q, k, v, *tails, *turned, key_mask, weight, state, phi.name, window, causal, scale, keep, *packed
    )
    return Attended(out, mass), end
