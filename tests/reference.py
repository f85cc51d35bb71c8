"""The operations of `qwen_mlx.kernels` in float64 NumPy, from inputs as they were rounded, and how far off a result is.

Written from the formulas, loop by loop, sharing no arithmetic with the package.
"""

from collections.abc import Iterable

import mlx.core as mx
import numpy as np

from qwen_mlx.kernels.gated_delta_step import StepWeights
from qwen_mlx.kernels.qk_norm_rope import HeadNorms

# Largest error over largest reference value, by the dtype that a result was rounded to. The reference sees the rounded
# inputs, so 16-bit inputs get no more than float32 ones.
TOLERANCE = {mx.float32: 5e-6, mx.float16: 1e-3, mx.bfloat16: 5e-3}
DTYPES = tuple(TOLERANCE)


def float64(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32), np.float64)


def error(results: Iterable[mx.array], references: Iterable[np.ndarray]) -> float:
    """The largest error ratio among pairs of result and reference; NaN and infinity count as infinite."""
    ratios = [np.abs(float64(x) - y).max() / np.abs(y).max() for x, y in zip(results, references, strict=True)]
    return max(float(ratio) if np.isfinite(ratio) else np.inf for ratio in ratios)


def within_tolerance(results: Iterable[mx.array], references: Iterable[np.ndarray]) -> bool:
    """Whether every result is as near to its reference as its own dtype allows."""
    return all(error([x], [y]) < TOLERANCE[x.dtype] for x, y in zip(results, references, strict=True))


def silu(z: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return z / (1 + np.exp(-z))


def causal_conv1d(
    x: mx.array, weight: mx.array, conv_state: mx.array, *, key_heads: int, key_dim: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """q, k [B, T, Hk, Dk], v [B, T, ...] and the last K-1 columns."""
    inputs, taps, before = float64(x), float64(weight), float64(conv_state)
    (B, T, _), K = inputs.shape, taps.shape[1]
    columns = np.concatenate([before, inputs], axis=1)
    y = silu(np.stack([np.einsum("bic,ci->bc", columns[:, t : t + K], taps) for t in range(T)], axis=1))
    q, k, v = np.split(y, [key_heads * key_dim, 2 * key_heads * key_dim], axis=-1)
    q, k = (a.reshape(B, T, key_heads, key_dim) for a in (q, k))
    q, k = (a / np.sqrt((a**2).sum(-1, keepdims=True) + 1e-6) for a in (q, k))
    return q / np.sqrt(key_dim), k, v, columns[:, T:]


def gated_delta_scan(
    q: mx.array, k: mx.array, v: mx.array, g: mx.array, beta: mx.array, state: mx.array
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """o, the new state and the tape of S = e^g S; d = beta (v - S k); S = S + d k^T; o = S q."""
    return _delta_rule(*(float64(x) for x in (q, k, v, g, beta, state)))


def gated_delta_rule(*inputs: mx.array) -> tuple[np.ndarray, np.ndarray]:
    """o and the new state."""
    return gated_delta_scan(*inputs)[:2]


def _delta_rule(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, g: np.ndarray, beta: np.ndarray, state: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    B, T, Hv, _ = v.shape
    group = Hv // q.shape[2]
    o, tape, state = np.zeros(v.shape), np.zeros(v.shape), state.copy()
    for b in range(B):
        for j in range(Hv):
            S = state[b, j]
            for t in range(T):
                q_t, k_t = q[b, t, j // group], k[b, t, j // group]
                S = np.exp(g[b, t, j]) * S
                tape[b, t, j] = beta[b, t, j] * (v[b, t, j] - S @ k_t)
                S = S + np.outer(tape[b, t, j], k_t)
                o[b, t, j] = S @ q_t
            state[b, j] = S
    return o, state, tape


def gated_delta_step(
    projected: tuple[mx.array, mx.array, mx.array, mx.array],
    weights: StepWeights,
    conv_state: mx.array,
    state: mx.array,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """y [B, 1, Hv Dv], the last columns and the new state."""
    z, a, b = (float64(x) for x in projected[1:])
    B, Hv, Dv, Dk = state.shape
    key_heads = (conv_state.shape[-1] - Hv * Dv) // (2 * Dk)
    q, k, v, columns = causal_conv1d(projected[0], weights.taps, conv_state, key_heads=key_heads, key_dim=Dk)
    g = -np.exp(float64(weights.A_log)) * np.logaddexp(0, a + float64(weights.dt_bias))
    o, after, _ = _delta_rule(q, k, v.reshape(B, 1, Hv, Dv), g, 1 / (1 + np.exp(-b)), float64(state))
    return rms_norm(o, weights.gain, weights.eps).reshape(z.shape) * silu(z), columns, after


def rms_norm(x: np.ndarray, gain: mx.array, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * float64(gain)


def qk_norm_rope(q: mx.array, k: mx.array, v: mx.array, norms: HeadNorms, offset: int) -> tuple[np.ndarray, np.ndarray]:
    """q [B, Hq, T, Dh], and k and v [2, B, Hkv, T, Dh].

    Angles alone are float32: position times frequency, as in the model.
    """
    Dh, R, frequencies = k.shape[-1], norms.rotary_dim, np.array(norms.frequencies)
    positions = np.arange(offset, offset + k.shape[1]).astype(np.float32)
    angles = (positions[:, None] * frequencies).astype(np.float64)[:, None]
    heads = []
    for x, gain in (q[..., :Dh], norms.q_gain), (k, norms.k_gain):
        y = rms_norm(float64(x), gain, norms.eps)
        left, right = y[..., : R // 2], y[..., R // 2 : R]
        turned = (left * np.cos(angles) - right * np.sin(angles), right * np.cos(angles) + left * np.sin(angles))
        heads.append(np.concatenate([*turned, y[..., R:]], axis=-1).transpose(0, 2, 1, 3))
    return heads[0], np.stack([heads[1], float64(v).transpose(0, 2, 1, 3)])
