# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportOptionalMemberAccess=false, reportAttributeAccessIssue=false
# Triton compiles this file by rules of its own, which a type checker does not know.
"""The gradients of the linear kernels, by queries and by keys; arguments as in `linear_sweeps`."""

import triton
import triton.language as tl

from core.attention.kernels.features import (
    factor_of,
    features,
    log_decay,
    product,
    through_features,
    through_focused,
    upstream,
    weights,
)
from core.attention.kernels.linear_sweeps import load_state, store_state
from core.attention.kernels.packs import line


@triton.jit
def query_gradient(
    q, k, v, d_out, scale, d_den, mask, gate, rate, factors, table, states, dq, along, d_factors,
    qb, qh, ql, kb, kh, kl, vb, vh, vl, db, dh, dl,
    H, GROUP, L, M, T, row0, key0, step, tiles, parts, size, mask_b, B,
    D: tl.constexpr, F: tl.constexpr, E: tl.constexpr, FP: tl.constexpr, DP: tl.constexpr,
    BE: tl.constexpr, C: tl.constexpr, MAP: tl.constexpr, CAUSAL: tl.constexpr, STATE: tl.constexpr,
    DECAY: tl.constexpr, ONES: tl.constexpr, MASK: tl.constexpr, NORMALIZE: tl.constexpr, PACK: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of one segment, summed over this tile's values, in a sweep with the forward's state."""
    pid = tl.program_id(0)
    tile, part, bh = pid % tiles, (pid // tiles) % parts, pid // (tiles * parts)
    b, h, bk = (bh // H).to(tl.int64), (bh % H).to(tl.int64), bh // GROUP
    f, c, e = tl.arange(0, FP), tl.arange(0, DP), tile * BE + tl.arange(0, BE)
    width: tl.constexpr = E + 1 if ONES else E
    begin, of, head, timeline = part * size, bk, bh.to(tl.int64) * L, T
    tiled = tile.to(tl.int64) * B * H * L
    if PACK:
        own, begin, first, L, key_first, M, T, row0, key0 = line(table, part)
        of += own * (H // GROUP)
        head += first
    s, z = tl.zeros([FP, BE], tl.float32), tl.zeros([FP], tl.float32)
    if STATE:
        at = (bk * parts + part if CAUSAL else of).to(tl.int64) * F * width
        s, z = load_state(states, at, f, e, F, E, ONES)
    q += b * qb + h * qh
    k += b * kb + h // GROUP * kh
    v += b * vb + h // GROUP * vh
    d_out += b * db + h * dh
    heads_rate = 0.0
    if DECAY == "constant":
        heads_rate = tl.load(rate + h).to(tl.float32)
    if DECAY == "given":
        gate += bk.to(tl.int64) * timeline
    factor, d_factor = factor_of(factors, h // GROUP, f, F, MAP), tl.zeros([FP], tl.float32)
    if PACK:
        gate += key_first
        q += first * ql
        k += key_first * kl
        v += key_first * vl
        d_out += first * dl
    for u0 in range(begin, tl.minimum(T, begin + size), C):
        u = u0 + tl.arange(0, C)
        i = (row0 + step * u).to(tl.int64)
        row = (u < T) & (i >= 0) & (i < L)
        place = head + i
        du, dz = upstream(d_out, scale, d_den, i * dl, place, row, e, E, NORMALIZE)
        dz = tl.where(tile == 0, dz, 0.0)  # the ones column belongs to one tile
        d = product(du, tl.trans(s), DOT, PRECISION) + dz[:, None] * z[None, :]
        if DECAY != "none":
            running, last = log_decay(gate, heads_rate, u0, u, T, C, DECAY)
            d *= tl.exp(running)[:, None]
        inner = tl.zeros([C, DP], tl.float32)
        if CAUSAL:
            j = (key0 + step * u).to(tl.int64)
            key = (u < T) & (j >= 0) & (j < M)
            if MASK:
                key = key & (tl.load(mask + b * mask_b + j, mask=key, other=0) != 0)
            fk = features(k, j * kl, key, f, D, F, MAP, factor)
            value = tl.load(v + (j * vl)[:, None] + e[None, :], mask=key[:, None] & (e < E)[None, :], other=0.0)
            dw = product(du, tl.trans(value), DOT, PRECISION) + dz[:, None]
            seen = (u[:, None] >= u[None, :]) & key[None, :]
            if DECAY != "none":
                dw *= tl.exp(tl.where(seen, running[:, None] - running[None, :], 0.0))
            dw = tl.where(seen, dw, 0.0)
            if MAP == "taylor":
                xq = features(q, i * ql, row, c, D, D, "identity")
                xk = features(k, j * kl, key, c, D, D, "identity")
                _, slope = weights(xq, xk, D, MAP, DOT, PRECISION)
                inner = product(dw * slope, xk, DOT, PRECISION)
            else:
                d += product(dw, fk, DOT, PRECISION)
            if DECAY != "none":
                fk *= tl.exp(last - running)[:, None]
                s *= tl.exp(last)
                z *= tl.exp(last)
            s += product(tl.trans(fk), value, DOT, PRECISION)
            z += tl.sum(fk, 0)
        if MAP == "focused":
            d, more = through_focused(q, i * ql, row, f, d, factor, F)
            d_factor += more
        else:
            d = through_features(q, i * ql, row, f, c, d, D, F, MAP, DOT, PRECISION)
        if MAP == "taylor":
            d += inner
        spot = (tiled + place)[:, None] * D + c[None, :]
        tl.store(dq + spot, d.to(dq.dtype.element_ty), mask=row[:, None] & (c < D)[None, :])
        if DECAY == "given":
            x = features(q, i * ql, row, c, D, D, "identity")
            tl.store(along + tiled + place, tl.sum(x * d, 1), mask=row)
    if MAP == "focused":
        tl.store(d_factors + pid * F + f, d_factor, mask=f < F)


@triton.jit
def key_gradient(
    q, k, v, d_out, scale, d_den, mask, gate, rate, factors, table, states, dk, dv, along, d_factors, d_first,
    qb, qh, ql, kb, kh, kl, vb, vh, vl, db, dh, dl,
    H, GROUP, L, M, T, row0, key0, step, tiles, parts, size, mask_b, B,
    D: tl.constexpr, F: tl.constexpr, E: tl.constexpr, FP: tl.constexpr, DP: tl.constexpr,
    BE: tl.constexpr, C: tl.constexpr, MAP: tl.constexpr, CAUSAL: tl.constexpr, STATE: tl.constexpr,
    DECAY: tl.constexpr, ONES: tl.constexpr, MASK: tl.constexpr, NORMALIZE: tl.constexpr, KEEP: tl.constexpr,
    PACK: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk (over this tile's values) and dv of one segment and query head, against time, with the state's gradient."""
    pid = tl.program_id(0)
    tile, part, bh = pid % tiles, (pid // tiles) % parts, pid // (tiles * parts)
    b, h, bk = (bh // H).to(tl.int64), (bh % H).to(tl.int64), bh // GROUP
    f, c, e = tl.arange(0, FP), tl.arange(0, DP), tile * BE + tl.arange(0, BE)
    width: tl.constexpr = E + 1 if ONES else E
    begin, of, head, to = part * size, bh, bh.to(tl.int64) * L, bh.to(tl.int64) * M
    tiled, timeline = tile.to(tl.int64) * B * H * M, T
    if PACK:
        own, begin, first, L, key_first, M, T, row0, key0 = line(table, part)
        of += own * H
        head += first
        to += key_first
    s, z = tl.zeros([FP, BE], tl.float32), tl.zeros([FP], tl.float32)
    if STATE:
        s, z = load_state(states, (bh * parts + part if CAUSAL else of).to(tl.int64) * F * width, f, e, F, E, ONES)
        z = tl.where(tile == 0, z, 0.0)
    q += b * qb + h * qh
    k += b * kb + h // GROUP * kh
    v += b * vb + h // GROUP * vh
    d_out += b * db + h * dh
    heads_rate = 0.0
    if DECAY == "constant":
        heads_rate = tl.load(rate + h).to(tl.float32)
    if DECAY == "given":
        gate += bk.to(tl.int64) * timeline
    factor, d_factor = factor_of(factors, h // GROUP, f, F, MAP), tl.zeros([FP], tl.float32)
    if PACK:
        gate += key_first
        q += first * ql
        k += key_first * kl
        v += key_first * vl
        d_out += first * dl
    end = tl.minimum(T, begin + size)
    chunks = tl.cdiv(end - begin, C)
    for n in range(chunks):
        u0 = begin + (chunks - 1 - n) * C
        u = u0 + tl.arange(0, C)
        j = (key0 + step * u).to(tl.int64)
        inside = (u < T) & (j >= 0) & (j < M)
        key = inside
        if MASK:
            key = key & (tl.load(mask + b * mask_b + j, mask=key, other=0) != 0)
        fk = features(k, j * kl, key, f, D, F, MAP, factor)
        value = tl.load(v + (j * vl)[:, None] + e[None, :], mask=key[:, None] & (e < E)[None, :], other=0.0)
        d = product(value, tl.trans(s), DOT, PRECISION) + z[None, :]
        write = fk
        if DECAY != "none":
            running, last = log_decay(gate, heads_rate, u0, u, T, C, DECAY)
            d *= tl.exp(last - running)[:, None]
            write = fk * tl.exp(last - running)[:, None]
        d_value = product(write, s, DOT, PRECISION)
        inner = tl.zeros([C, DP], tl.float32)
        if CAUSAL:
            i = (row0 + step * u).to(tl.int64)
            row = (u < T) & (i >= 0) & (i < L)
            fq = features(q, i * ql, row, f, D, F, MAP, factor)
            du, dz = upstream(d_out, scale, d_den, i * dl, head + i, row, e, E, NORMALIZE)
            dz = tl.where(tile == 0, dz, 0.0)
            dw = product(du, tl.trans(value), DOT, PRECISION) + dz[:, None]
            seen = (u[:, None] >= u[None, :]) & key[None, :]
            if MAP == "taylor":
                xq = features(q, i * ql, row, c, D, D, "identity")
                xk = features(k, j * kl, key, c, D, D, "identity")
                w, slope = weights(xq, xk, D, MAP, DOT, PRECISION)
            else:
                w, slope = weights(fq, fk, D, MAP, DOT, PRECISION)
            if DECAY != "none":
                fall = tl.exp(tl.where(seen, running[:, None] - running[None, :], 0.0))
                w *= fall
                dw *= fall
            if MAP == "taylor":
                inner = product(tl.trans(tl.where(seen, dw * slope, 0.0)), xq, DOT, PRECISION)
            else:
                d += product(tl.trans(tl.where(seen, dw, 0.0)), fq, DOT, PRECISION)
            d_value += product(tl.trans(tl.where(seen, w, 0.0)), du, DOT, PRECISION)
            if DECAY != "none":
                fq *= tl.exp(running)[:, None]
                s *= tl.exp(last)
                z *= tl.exp(last)
            s += product(tl.trans(fq), du, DOT, PRECISION)
            z += tl.sum(fq * dz[:, None], 0)
        if MAP == "focused":
            d, more = through_focused(k, j * kl, key, f, d, factor, F)
            d_factor += more
        else:
            d = through_features(k, j * kl, key, f, c, d, D, F, MAP, DOT, PRECISION)
        if MAP == "taylor":
            d += inner
        d = tl.where(key[:, None], d, 0.0)
        place = to + j
        spot = (tiled + place)[:, None] * D + c[None, :]
        tl.store(dk + spot, d.to(dk.dtype.element_ty), mask=inside[:, None] & (c < D)[None, :])
        d_value = tl.where(key[:, None], d_value, 0.0)
        spot = dv + place[:, None] * E + e[None, :]
        tl.store(spot, d_value.to(dv.dtype.element_ty), mask=inside[:, None] & (e < E)[None, :])
        if DECAY == "given":
            x = features(k, j * kl, key, c, D, D, "identity")
            tl.store(along + tiled + place, tl.sum(x * d, 1), mask=inside)
    if MAP == "focused":
        tl.store(d_factors + pid * F + f, d_factor, mask=f < F)
    if KEEP:
        store_state(d_first, bh.to(tl.int64) * F * width, f, e, s, z, tile, F, E, ONES)
