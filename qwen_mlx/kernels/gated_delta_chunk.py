"""The gated delta rule by chunks (WY form, arXiv:2412.06464, section 3.3): few large products instead of T steps."""

from functools import cache

import mlx.core as mx
import numpy as np

from qwen_mlx.kernels.backend import Kernel
from qwen_mlx.kernels.gated_delta_arguments import ROWS

CHUNK = Kernel("gated_delta_chunk", ("q", "k", "v", "g", "beta", "state"), ("o", "state_out"))

# Most tokens in a chunk of the plain form. The work inside one grows with its square, the number of sequential steps
# falls with it: on a CPU 16 is about as fast as 32, but has twice the steps, each several launches on a GPU; 64 is 1.3
# to 1.4 times slower.
CHUNK_TOKENS = 32


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
    N = -(-T // CHUNK_TOKENS)
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


def metal_gated_delta_chunk(
    q: mx.array, k: mx.array, v: mx.array, g: mx.array, beta: mx.array, state: mx.array
) -> list[mx.array]:
    B, _, Hv, Dv = v.shape
    return CHUNK(
        q,
        k,
        v,
        g,
        beta,
        state,
        outputs=[(v.shape, mx.float32), (state.shape, mx.float32)],
        grid=(Dv // ROWS, B * Hv),
        simdgroups=8,
        Dk=state.shape[-1],
    )
