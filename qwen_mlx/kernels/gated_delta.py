"""The gated delta rule: queries, keys, values, log decays and write strengths in; outputs and the advanced state out.

Queries and keys come normalized and scaled, decays and strengths after their activations. This module knows nothing of
projections, convolutions, gates behind the output, or caches.
"""

from functools import cache

import mlx.core as mx
import numpy as np

# Most tokens in a chunk. The work inside one grows with its square, the number of sequential steps falls with it: on a
# CPU 16 is about as fast as 32, but has twice the steps, each several launches on a GPU; 64 is 1.3 to 1.4 times slower.
CHUNK = 32


def gated_delta_rule(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    g: mx.array,
    beta: mx.array,
    state: mx.array,
    *,
    mask: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """Advance the state S of every value head over T tokens and read it with the query after each.

        S = exp(g_t) S;   S = S + beta_t (v_t - S k_t) k_t^T;   o_t = S q_t          (arXiv:2412.06464, eq. 10)

    q, k [B, T, Hk, Dk]; v [B, T, Hv, Dv]; g [B, T, Hv] log decay, float32, <= 0, -inf erases the state;
    beta [B, T, Hv] in 0..1; state [B, Hv, Dv, Dk] float32; mask [B, T] bool: False leaves the state as it is, and the
    output of that token means nothing. Value head j reads key head floor(j Hk / Hv). All arithmetic is float32.

    Returns o [B, T, Hv, Dv] in float32, because the norm behind it wants every bit, and the new state.
    Raises ValueError for a shape or dtype other than these, and for T = 0.
    """
    _check(q, k, v, g, beta, state, mask)
    if mask is not None:  # no decay and no write: exactly the state before
        g = mx.where(mask[..., None], g, 0)
        beta = mx.where(mask[..., None], beta, 0)
    # One chunk of T tokens already beats T single steps at T = 2 (measured: level at 2, 2 to 3 times faster at 8).
    rule = recurrent_gated_delta_rule if q.shape[1] == 1 else chunk_gated_delta_rule
    return rule(q, k, v, g, beta, state)


def naive_gated_delta_rule(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    g: mx.array,
    beta: mx.array,
    state: mx.array,
    *,
    mask: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """The formula of `gated_delta_rule`, token by token, for the reader; same arguments and results."""
    group = v.shape[2] // q.shape[2]
    q, k = (mx.repeat(x.astype(mx.float32), group, axis=2) for x in (q, k))  # [B, T, Hv, Dk]
    v, beta = v.astype(mx.float32), beta.astype(mx.float32)
    outputs = []
    for t in range(q.shape[1]):
        decayed = mx.exp(g[:, t, :, None, None]) * state
        recalled = (decayed @ k[:, t, :, :, None]).squeeze(-1)  # [B, Hv, Dv]
        delta = beta[:, t, :, None] * (v[:, t] - recalled)
        updated = decayed + delta[..., :, None] * k[:, t, :, None, :]
        state = updated if mask is None else mx.where(mask[:, t, None, None, None], updated, state)
        outputs.append((state @ q[:, t, :, :, None]).squeeze(-1))
    return mx.stack(outputs, axis=1), state


def recurrent_gated_delta_rule(
    q: mx.array, k: mx.array, v: mx.array, g: mx.array, beta: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """One token (T = 1), the state read once: with d = beta (v - S k), o = S q + (k . q) d needs no second pass."""
    B, _, Hk, Dk = q.shape
    Hv, Dv = v.shape[2:]
    q, k = (x.astype(mx.float32).reshape(B, Hk, 1, 1, Dk) for x in (q, k))
    v = v.astype(mx.float32).reshape(B, Hk, -1, Dv, 1)
    alpha = mx.exp(g).reshape(B, Hk, -1, 1, 1)
    beta = beta.astype(mx.float32).reshape(B, Hk, -1, 1, 1)
    state = state.reshape(B, Hk, -1, Dv, Dk)
    read = alpha * (state @ mx.concatenate([k, q], axis=-2).swapaxes(-1, -2))  # [B, Hk, Hv/Hk, Dv, 2]
    delta = beta * (v - read[..., :1])
    o = read[..., 1:] + delta * (k * q).sum(axis=-1, keepdims=True)
    state = alpha * state + delta * k
    return o.reshape(B, 1, Hv, Dv), state.reshape(B, Hv, Dv, Dk)


def chunk_gated_delta_rule(
    q: mx.array, k: mx.array, v: mx.array, g: mx.array, beta: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """Any T, three matmuls in sequence per chunk of up to 32 tokens (WY form, arXiv:2412.06464, section 3.3).

    With D_ij the decay from token j to token i of a chunk, D_i0 that from the chunk's start, D_Cj that to its end:

        A = tril(diag(beta) K K^T * D, -1);   U = (I + A)^-1 diag(beta) (V - diag(D_i0) K S^T)
        O = diag(D_i0) Q S^T + tril(Q K^T * D) U;   S' = D_C0 S + U^T diag(D_Cj) K
    """
    B, T, Hk, Dk = q.shape
    Hv, Dv = v.shape[2:]
    N = -(-T // CHUNK)
    C = -(-T // N)  # equal chunks: T = 33 becomes 2 of 17, not 32 and 1 padded to 32
    q, k, v, g, beta = (_split_chunks(x, N, C, Hk) for x in (q, k, v, g, beta))
    strict, lower = _triangle(C, -1), _triangle(C, 0)
    alpha = mx.exp(g)[..., None]  # [N, B, Hk, Hv/Hk, C, 1]
    # Products, not exp(G_i - G_j): a difference of sums is NaN after a zero decay and loses digits after a strong one.
    decay = mx.cumprod(mx.where(strict == 1, alpha, 1), axis=-2)  # [N, B, Hk, Hv/Hk, C, C], ones above the diagonal
    from_start = mx.cumprod(alpha, axis=-2)
    kq = mx.concatenate([k, q], axis=-2)  # [N, B, Hk, 1, 2C, Dk]
    gram = kq @ k.swapaxes(-1, -2)  # K K^T over Q K^T, once per key head
    inverse = _unit_lower_inverse(gram[..., :C, :] * (decay * strict) * beta[..., None]) * beta[..., None, :]
    scores = gram[..., C:, :] * (decay * lower)
    k_to_end = k * decay[..., -1, :, None]  # [N, B, Hk, Hv/Hk, C, Dk]
    state = state.reshape(B, Hk, -1, Dv, Dk)
    outputs = []
    for n in range(N):
        read = kq[n] @ state.swapaxes(-1, -2)  # [B, Hk, Hv/Hk, 2C, Dv]
        u = inverse[n] @ (v[n] - from_start[n] * read[..., :C, :])
        outputs.append(from_start[n] * read[..., C:, :] + scores[n] @ u)
        state = mx.addmm(from_start[n, ..., -1:, :] * state, u.swapaxes(-1, -2), k_to_end[n])
    o = mx.stack(outputs, axis=1).transpose(0, 1, 4, 2, 3, 5)  # [B, N, C, Hk, Hv/Hk, Dv]
    return o.reshape(B, N * C, Hv, Dv)[:, :T], state.reshape(B, Hv, Dv, Dk)


def _split_chunks(x: mx.array, N: int, C: int, Hk: int) -> mx.array:
    """[B, T, H, ...] to float32 [N, B, Hk, H/Hk, C, ...]; padded with zeros, that is no decay and no write."""
    B, T = x.shape[:2]
    x = x.astype(mx.float32)
    if T < N * C:
        x = mx.pad(x, [(0, 0), (0, N * C - T)] + [(0, 0)] * (x.ndim - 2))
    x = x.reshape(B, N, C, Hk, -1, *x.shape[3:])
    return mx.moveaxis(mx.moveaxis(x, 1, 0), 2, 4)


def _unit_lower_inverse(A: mx.array) -> mx.array:
    """(I + A)^-1 of the strictly lower triangular A [..., C, C], by diagonal blocks of 1, 2, 4, ... merged pairwise.

    If X inverts the diagonal blocks and L holds what lies below the diagonal inside the merged ones, X - X L X inverts
    those. The shorter (I - A)(I + A^2)(I + A^4)... errs by more than the result for near-equal keys: its powers cancel.
    """
    C = A.shape[-1]
    inverse = mx.eye(C) - A * _block_level(C, 0)
    for level in range(1, (C - 1).bit_length()):
        inverse = inverse - inverse @ (A * _block_level(C, level)) @ inverse
    return inverse


@cache
def _triangle(C: int, diagonal: int) -> mx.array:
    """Ones [C, C] on and below the diagonal 0, or strictly below for -1."""
    return mx.array(np.tril(np.ones((C, C), np.float32), diagonal))


@cache
def _block_level(C: int, level: int) -> mx.array:
    """Ones [C, C] in the left lower quarter of every pair of diagonal blocks of size 2^level."""
    i, j = np.indices((C, C))
    return mx.array(((i >> (level + 1) == j >> (level + 1)) & (i >> level > j >> level)).astype(np.float32))


def _check(
    q: mx.array, k: mx.array, v: mx.array, g: mx.array, beta: mx.array, state: mx.array, mask: mx.array | None
) -> None:
    for name, x, letters in ("q", q, "[B, T, Hk, Dk]"), ("v", v, "[B, T, Hv, Dv]"):
        if x.ndim != 4:
            raise ValueError(f"{name} has shape {x.shape}; it must be {letters}.")
    B, T, Hk, Dk = q.shape
    Hv, Dv = v.shape[2:]
    expected: list[tuple[str, mx.array, tuple[int, ...]]] = [
        ("k", k, (B, T, Hk, Dk)),
        ("v", v, (B, T, Hv, Dv)),
        ("g", g, (B, T, Hv)),
        ("beta", beta, (B, T, Hv)),
        ("state", state, (B, Hv, Dv, Dk)),
    ]
    if mask is not None:
        expected.append(("mask", mask, (B, T)))
    for name, x, shape in expected:
        if x.shape != shape:
            raise ValueError(f"{name} has shape {x.shape}; beside q {q.shape} and v {v.shape} it must be {shape}.")
    if T == 0:
        raise ValueError(f"q has shape {q.shape}: no token to process; pass at least one.")
    if Hv % Hk:
        raise ValueError(f"v {v.shape} has {Hv} heads, which is no multiple of the {Hk} heads of q {q.shape}.")
    for name, x in ("g", g), ("state", state):  # 16 bits turn a decay of 0.999 into 1
        if x.dtype != mx.float32:
            raise ValueError(f"{name} has dtype {x.dtype}; it must be float32.")
    if mask is not None and mask.dtype != mx.bool_:
        raise ValueError(f"mask has dtype {mask.dtype}; it must be bool.")
