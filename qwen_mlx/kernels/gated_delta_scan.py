"""The gated delta rule token by token, with a tape from which the state after any of the tokens can be made again."""

from dataclasses import dataclass

import mlx.core as mx

from qwen_mlx.kernels.backend import Kernel
from qwen_mlx.kernels.gated_delta_arguments import ROWS, check_arguments, freeze_masked, kernels_fit

INPUTS = ("q", "k", "v", "g", "beta", "state")
SCAN = Kernel("gated_delta_scan", INPUTS, ("o", "state_out"))
SCAN_WITH_TAPE = Kernel("gated_delta_scan", INPUTS, ("o", "state_out", "tape"), defines=("TAPE",))
REPLAY = Kernel("gated_delta_replay", ("state", "k", "g", "tape", "n"), ("state_out",))


@dataclass(frozen=True)
class Tape:
    """What T tokens did to a state: k [B, T, Hk, Dk], log decay g and written delta [B, T, Hv] and [B, T, Hv, Dv]."""

    k: mx.array
    g: mx.array
    delta: mx.array


def gated_delta_scan(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    g: mx.array,
    beta: mx.array,
    state: mx.array,
    *,
    mask: mx.array | None = None,
) -> tuple[mx.array, mx.array, Tape]:
    """`gated_delta_rule`, one token after the other, and the tape of

        d_t = beta_t (v_t - exp(g_t) S_{t-1} k_t),   by which S_t = exp(g_t) S_{t-1} + d_t k_t^T

    Arguments, results and errors are those of `gated_delta_rule`; `gated_delta_replay` reads the tape.
    """
    check_arguments(q, k, v, g, beta, state, mask)
    g, beta = freeze_masked(g, beta, mask)
    if tape_is_fused(state, q.shape[2]):
        o, state, delta = metal_gated_delta_scan(q, k, v, g, beta, state, kernel=SCAN_WITH_TAPE)
    else:
        o, state, delta = recurrent_gated_delta_scan(q, k, v, g, beta, state)
    return o, state, Tape(k, g, delta)


def tape_is_fused(state: mx.array, key_heads: int) -> bool:
    """Whether kernels write the tape of such a state and replay it. One of them alone would round unlike plain MLX."""
    return SCAN_WITH_TAPE.usable and REPLAY.usable and kernels_fit(key_heads, *state.shape[1:])


def naive_gated_delta_scan(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    g: mx.array,
    beta: mx.array,
    state: mx.array,
    *,
    mask: mx.array | None = None,
) -> tuple[mx.array, mx.array, Tape]:
    """The formula of `gated_delta_scan` for the reader; same arguments and results."""
    group = v.shape[2] // q.shape[2]
    queries, keys = (mx.repeat(x.astype(mx.float32), group, axis=2) for x in (q, k))  # [B, T, Hv, Dk]
    v, (g, beta) = v.astype(mx.float32), freeze_masked(g, beta.astype(mx.float32), mask)
    outputs, deltas = [], []
    for t in range(q.shape[1]):
        decayed = mx.exp(g[:, t, :, None, None]) * state
        recalled = (decayed @ keys[:, t, :, :, None]).squeeze(-1)  # [B, Hv, Dv]
        deltas.append(beta[:, t, :, None] * (v[:, t] - recalled))
        state = decayed + deltas[-1][..., :, None] * keys[:, t, :, None, :]
        outputs.append((state @ queries[:, t, :, :, None]).squeeze(-1))
    return mx.stack(outputs, axis=1), state, Tape(k, g, mx.stack(deltas, axis=1))


def recurrent_gated_delta_scan(
    q: mx.array, k: mx.array, v: mx.array, g: mx.array, beta: mx.array, state: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """o, the new state and d [B, T, Hv, Dv]; for each token the state is read once.

    With d = beta (v - exp(g) S k), o = exp(g) S q + (k . q) d needs no second pass, and all of it but S k, d and S
    itself is computed for all tokens at once.
    """
    B, T, Hk, Dk = q.shape
    Hv, Dv = v.shape[2:]
    q, k = (x.astype(mx.float32).reshape(B, T, Hk, 1, 1, Dk) for x in (q, k))
    v = v.astype(mx.float32).reshape(B, T, Hk, -1, Dv, 1)
    alpha = mx.exp(g).reshape(B, T, Hk, -1, 1, 1)
    beta = beta.astype(mx.float32).reshape(B, T, Hk, -1, 1, 1)
    columns = mx.concatenate([k, q], axis=-2).swapaxes(-1, -2)  # [B, T, Hk, 1, Dk, 2]
    state = state.reshape(B, Hk, -1, Dv, Dk)
    reads, deltas = [], []
    for a, b, x, key, column in zip(*(_tokens(x) for x in (alpha, beta, v, k, columns))):
        read = a * (state @ column)  # [B, Hk, Hv/Hk, Dv, 2]
        delta = b * (x - read[..., :1])
        state = a * state + delta * key
        reads.append(read)
        deltas.append(delta)
    d = mx.stack(deltas, axis=1)
    o = mx.stack(reads, axis=1)[..., 1:] + d * (k * q).sum(axis=-1, keepdims=True)
    return o.reshape(B, T, Hv, Dv), state.reshape(B, Hv, Dv, Dk), d.reshape(B, T, Hv, Dv)


def _tokens(x: mx.array) -> list[mx.array]:
    """[B, T, ...] -> T times [B, ...]"""
    return [x[:, t] for t in range(x.shape[1])]


def metal_gated_delta_scan(
    q: mx.array, k: mx.array, v: mx.array, g: mx.array, beta: mx.array, state: mx.array, *, kernel: Kernel
) -> list[mx.array]:
    """The outputs of `kernel`, which is SCAN or SCAN_WITH_TAPE."""
    B, Hv, Dv, Dk = state.shape
    tokens, whole = (v.shape, mx.float32), (state.shape, mx.float32)
    return kernel(
        q,
        k,
        v,
        g,
        beta,
        state,
        outputs=[tokens, whole, tokens][: len(kernel.outputs)],
        grid=(Dv // ROWS, B * Hv),
        simdgroups=4,
        Key=q.dtype,
        Dk=Dk,
    )
