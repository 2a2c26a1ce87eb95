"""From what linear attention is given to what its kernels take: which kernel, and features that are not its own."""

from torch import Tensor

from core.attention.contract import Attended
from core.attention.feature_maps import FEATURE_MAPS
from core.attention.kernels.linear import MAPS, linear_forward
from core.attention.kernels.step import is_step, linear_step
from core.attention.learned_maps import Focused
from core.attention.packing import Pack


def run(
    q, k, v, phi, direction, offset, key_mask, slopes, normalize, state, count, pack: Pack | None = None
) -> tuple[Attended, Tensor]:
    """The implementation "triton" of "linear"; phi: a `FeatureMap`, or `Focused`, which the kernel computes."""
    factor = None
    if isinstance(phi, Focused):
        factor = phi.factor()
        factor = factor.repeat_interleave(k.shape[1] // factor.shape[0], 0)  # where keys are repeated for a decay
    elif phi.name not in MAPS:
        q, k = phi.features(q.float()).to(q.dtype), phi.features(k.float()).to(k.dtype)
        phi = FEATURE_MAPS["given_floored" if phi.floor else "given"]
    if factor is None and direction == "past" and offset == 0 and is_step(q, k, v, state):
        out, mass, total = linear_step(q, k, v, key_mask, slopes, state, count, phi.name, normalize)
        return Attended(out, mass), total
    out, mass, _, total = linear_forward(
        q, k, v, key_mask, slopes, state, count, phi.name, direction, offset, normalize, factor, *(pack or ())
    )
    return Attended(out, mass), total


def turned_step(q, k, v, phi, key_mask, slopes, rotary, state, count) -> tuple[Attended, Tensor] | None:
    """`run` of one token whose features are turned in the numerator, after a state; None if this is something else."""
    if phi.name not in MAPS:
        given = FEATURE_MAPS["given_floored" if phi.floor else "given"]
        q, k, phi = phi.features(q.float()), phi.features(k.float()), given
    turn, of_keys = rotary
    if turn.planes > 1 or phi.width(q.shape[3]) % 2 or not is_step(q, k, v, state):
        return None
    given = slopes, state, count, phi.name, True, turn.coordinates, of_keys.coordinates, turn.base, turn.interleaved
    out, mass, total = linear_step(q, k, v, key_mask, *given)
    return Attended(out, mass), total
