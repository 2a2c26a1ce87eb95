"""Packed batches: sequences of different lengths laid end to end, attended each on its own.

    x        a0 a1 a2 | b0 | c0 c1        cu_seqlens = [0, 3, 4, 6]

A variant whose kernels read the offsets takes the pack as it is (`Pack`). For any other, sequences are unpacked into a
few batches padded on the right, one per power of two of their length, so at most half of the rows are padding however
ragged the pack is, and any mechanism that honours a key mask serves packs exactly. One whose pattern depends on the
whole length asks for batches without padding.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from core.attention.contract import Attended


class Pack(NamedTuple):
    """Where the sequences of a pack begin, for kernels that read it.

    offsets: [N + 1] integers on the device of the pack; sequence n owns rows offsets[n] to offsets[n + 1].
    keys: the same for keys; the same tensor where rows and keys are one.
    longest: rows or keys of the longest sequence, at most.
    """

    offsets: Tensor
    keys: Tensor
    longest: int

    def reversed(self) -> "Pack":
        """The same pack, its rows from the last to the first."""
        offsets, keys = (one[-1] - one.flip(0) for one in (self.offsets, self.keys))
        return Pack(offsets, keys, self.longest)

    def seen(self, rows: int, direction: str, offset: int) -> Tensor:
        """Keys of its own sequence that each row [T] sees, in a direction of `core.attention.blocked.linear`."""
        row = torch.arange(rows, device=self.offsets.device)
        own = torch.searchsorted(self.offsets[1:].contiguous(), row, right=True)
        keys, at = self.keys.diff()[own], row - self.offsets[own] + offset
        if direction == "both":
            return keys
        return torch.minimum((at + 1).clamp(min=0), keys) if direction == "past" else keys - torch.minimum(at, keys)


def pack_of(q: Tensor, k: Tensor, offsets: Tensor, key_offsets: Tensor | None = None) -> Pack:
    """The `Pack` of queries [1, H, T, D] and keys [1, K, U, D]; offsets as in `attend_packed`.

    Offsets on the host are checked there, and say how long the longest sequence is. Those on a device, and those of a
    compiled program, are checked on the device, without waiting for it.

    Raises:
        ValueError: offsets do not describe the pack.
    """
    given = [(offsets, q.shape[2], "cu_seqlens")]
    if key_offsets is not None:
        given.append((key_offsets, k.shape[2], "cu_seqlens of the context"))
    longest, placed = 0, []
    for one, total, name in given:
        if one.device.type == "cpu" and not torch.compiler.is_compiling():
            longest = max(longest, 0, *_spans(one, total, name)[1])
        else:
            _check_shape(one, name)
            right = (one[0] == 0) & (one[-1] == total) & (one.diff() >= 0).all()
            torch.ops.aten._assert_async.msg(right, f"{name} must rise from 0 to {total}, the packed length")
            longest = max(longest, total)
        placed.append(one.to(q.device, non_blocking=True))
    _check_number(q, placed[0].shape[0] - 1, placed[-1].shape[0] - 1)
    return Pack(placed[0], placed[-1], longest)


def attend_packed(
    attend: Callable[..., Attended],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    key_offsets: Tensor | None = None,
    *,
    exact: bool = False,
) -> Attended:
    """Run `attend` on every sequence of a pack.

    Args:
        attend: (q, k, v, key_mask, rows) -> Attended on a padded batch; rows int64 [n, L] are the packed rows of its
            queries (padding repeats a valid row), for whatever is known per row.
        q: [1, H, T, D].   k: [1, K, U, D].   v: [1, K, U, E].
        offsets: [N + 1] integers from 0 to T, never falling; sequence n owns rows offsets[n] to offsets[n + 1].
        key_offsets: the same for keys, with the same N; None: those of the queries. Not for causal attention.
        exact: batch sequences of one length only, so that nothing is padded.

    Returns:
        `Attended` in packed form, log mass only where `attend` gives one.

    Raises:
        ValueError: offsets do not describe the pack.
    """
    starts, lengths = _spans(offsets, q.shape[2], "cu_seqlens")
    same = key_offsets is None
    key_starts, key_lengths = (
        (starts, lengths) if same else _spans(key_offsets, k.shape[2], "cu_seqlens of the context")
    )
    _check_number(q, len(lengths), len(key_lengths))
    out = v.new_zeros(1, q.shape[1], q.shape[2], v.shape[3])
    mass = None
    groups: dict[tuple[int, int], list[int]] = {}
    for n, (length, keys) in enumerate(zip(lengths, key_lengths)):
        if length and keys:
            size = (length, keys) if exact else (length.bit_length(), keys.bit_length())
            groups.setdefault(size, []).append(n)
    parts = []
    for members in groups.values():
        rows, real = _rows([starts[n] for n in members], [lengths[n] for n in members], q.device)
        columns, key_mask = (
            (rows, real)
            if same
            else _rows([key_starts[n] for n in members], [key_lengths[n] for n in members], q.device)
        )
        given = attend(_take(q, rows), _take(k, columns), _take(v, columns), key_mask, rows)
        parts.append((rows[real], given, real))
    for rows, given, real in parts:
        out = out.index_copy(2, rows, given.out.transpose(0, 1)[:, real].unsqueeze(0).to(out.dtype))
        if given.log_mass is not None:
            if mass is None:
                mass = given.log_mass.new_full((1, q.shape[1], q.shape[2]), -torch.inf)
            mass = mass.index_copy(2, rows, given.log_mass.transpose(0, 1)[:, real].unsqueeze(0))
    return Attended(out, mass)


def _check_number(q: Tensor, sequences: int, key_sequences: int) -> None:
    if q.shape[0] != 1 or key_sequences != sequences:
        raise ValueError(
            f"a pack has batch 1 and as many key as query sequences, got batch {q.shape[0]}, "
            f"{sequences} and {key_sequences} sequences"
        )


def _check_shape(offsets: Tensor, name: str) -> None:
    if offsets.dim() != 1 or offsets.numel() < 1 or offsets.is_floating_point():
        raise ValueError(f"{name} must be integers [N + 1], got {offsets.dtype} {list(offsets.shape)}")


def _spans(offsets: Tensor, total: int, name: str) -> tuple[list[int], list[int]]:
    _check_shape(offsets, name)
    at = offsets.tolist()
    if at[0] != 0 or at[-1] != total or any(b < a for a, b in pairwise(at)):
        raise ValueError(
            f"{name} must rise from 0 to {total}, the packed length; got {at[:8]}{'...' if len(at) > 8 else ''}"
        )
    return at[:-1], [b - a for a, b in pairwise(at)]


def _rows(starts: list[int], lengths: list[int], device) -> tuple[Tensor, Tensor]:
    longest = max(lengths)
    start = torch.tensor(starts, device=device)[:, None]
    length = torch.tensor(lengths, device=device)[:, None]
    at = torch.arange(longest, device=device)[None, :].expand(len(starts), -1)
    return start + torch.minimum(at, length - 1), at < length


def _take(x: Tensor, rows: Tensor) -> Tensor:
    """[1, H, T, D] at rows [n, L] -> [n, H, L, D]."""
    return x[0][:, rows].transpose(0, 1)
