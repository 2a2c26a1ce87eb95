"""From what the hybrid is given to what its kernel takes: features that are not the kernel's own, rotations, gate."""

from torch import Tensor

from core.attention.contract import Attended, State, hide
from core.attention.feature_maps import FEATURE_MAPS
from core.attention.feature_projection import featured
from core.attention.kernels import hybrid
from core.attention.kernels.features import MAPS
from core.attention.kernels.ring_step import hybrid_step
from core.attention.kernels.step import is_step
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


def stepped(
    q, k, v, tail_q, tail_of, state: State, window, phi, gate, key_mask, slopes, scale, rotary
) -> tuple[Attended, State] | None:
    """A single new token after a state by one launch; None if these are more, or somebody asks for a gradient.

    Beside the launch torch projects the tails of maps that have a projection, and makes features that are not the
    kernels' own; elu and relu of the heads themselves are made in the kernel, also with rotary positions.
    """
    keys, values, mask = (state[name] for name in ("keys", "values", "mask"))
    if not is_step(q, k, v, state["sum"], keys, values, gate, tail_q):
        return None
    turns = rotary
    if rotary is not None:
        if rotary[0].planes > 1 or q.shape[3] % 2:
            return None
        if phi.kernel:  # rotated before phi, by torch: the leaving key is `window` behind the new one
            turns = rotary[0], rotary[1].extended(window).first(1)
    a, c, phi, turns, level = featured(tail_q, tail_of(keys[:, :, :1]), phi, turns)
    if phi.name not in MAPS:
        a, c = phi.features(a.float()), phi.features(c.float())
        phi = FEATURE_MAPS["given_floored" if phi.floor else "given"]
    if not is_step(a, c, v, state["sum"]) or (turns is not None and phi.width(a.shape[3]) % 2):
        return None
    at = (None, None) if rotary is None else (rotary[0].coordinates, rotary[1].coordinates)
    base, interleaved = (10_000.0, False) if rotary is None else rotary[0][1:3]
    out, mass, *ring, sums, count = hybrid_step(
        q, k, v, a, c, key_mask, gate, level, slopes, keys, values, mask, state["sum"], state["count"], *at, phi.name,
        scale, base, interleaved, turns is not None,
    )  # fmt: skip
    return Attended(out, mass), dict(zip(("keys", "values", "mask", "sum", "count"), (*ring, sums, count)))
