"""Projected queries, keys and values made ready for attention and its cache: norms and rotations in one launch."""

from dataclasses import dataclass

import mlx.core as mx

from qwen_mlx.kernels.backend import Kernel

QK_NORM_ROPE = Kernel(
    "qk_norm_rope",
    ("q", "k", "v", "q_gain", "k_gain", "frequencies", "eps", "offset"),
    ("q_out", "keys_values"),
)


@dataclass(frozen=True)
class HeadNorms:
    """Of one layer, in float32: the gains of queries and keys [Dh], the norms' eps, and the frequencies [R/2]."""

    q_gain: mx.array
    k_gain: mx.array
    eps: float
    frequencies: mx.array

    @property
    def rotary_dim(self) -> int:
        """R, the rotated dimensions."""
        return 2 * self.frequencies.size


def heads_are_fused(head_dim: int, rotary_dim: int) -> bool:
    """Whether `qk_norm_rope` has a kernel here for heads of this size."""
    return QK_NORM_ROPE.usable and heads_fit(head_dim, rotary_dim)


def heads_fit(head_dim: int, rotary_dim: int) -> bool:
    """Whether the kernel is written for heads of this size."""
    return head_dim % 32 == 0 and rotary_dim % 64 == 0 and rotary_dim <= head_dim


def qk_norm_rope(
    q: mx.array, k: mx.array, v: mx.array, norms: HeadNorms, offset: int | mx.array
) -> tuple[mx.array, mx.array]:
    """RMSNorm of every query and key, then the rotation of its first R elements by half-split pairs.

        y = x / sqrt(mean(x^2) + eps) * gain;   a_j = position * frequencies_j, j < R/2
        y_j = y_j cos a_j - y_{j+R/2} sin a_j;  y_{j+R/2} = y_{j+R/2} cos a_j + y_j sin a_j

    q [B, T, Hq, 2 Dh]: each head's query before its gate, which is not read; k, v [B, T, Hkv, Dh]; token t stands at
    `offset` + t. Returns q [B, Hq, T, Dh], and keys and values, these as they are, as a cache takes them:
    [2, B, Hkv, T, Dh]; all in the dtype of q. Ask `heads_are_fused` first.
    """
    B, T, Hq, _ = q.shape
    Hkv, Dh = k.shape[2:]
    queries, keys_values = QK_NORM_ROPE(
        q,
        k,
        v,
        norms.q_gain,
        norms.k_gain,
        norms.frequencies,
        norms.eps,
        offset if isinstance(offset, mx.array) else mx.array(offset, mx.int32),
        outputs=[((B, Hq, T, Dh), q.dtype), ((2, B, Hkv, T, Dh), q.dtype)],
        grid=(Hq + 2 * Hkv, B * T),
        simdgroups=4,
        X=q.dtype,
        Dh=Dh,
        R=norms.rotary_dim,
    )
    return queries, keys_values


def naive_qk_norm_rope(
    q: mx.array, k: mx.array, v: mx.array, norms: HeadNorms, offset: int | mx.array
) -> tuple[mx.array, mx.array]:
    """The formula of `qk_norm_rope` for the reader; same arguments and results."""
    Dh, half = k.shape[-1], norms.rotary_dim // 2
    positions = (offset + mx.arange(k.shape[1])).astype(mx.float32)
    angles = positions[:, None, None] * norms.frequencies  # [T, 1, R/2]
    cos, sin = mx.cos(angles), mx.sin(angles)
    heads = []
    for x, gain in (q[..., :Dh], norms.q_gain), (k, norms.k_gain):
        y = x.astype(mx.float32)
        y = y / mx.sqrt((y * y).mean(axis=-1, keepdims=True) + norms.eps) * gain
        left, right, rest = mx.split(y, [half, 2 * half], axis=-1)
        y = mx.concatenate([left * cos - right * sin, right * cos + left * sin, rest], axis=-1)
        heads.append(y.astype(x.dtype))
    queries, keys, values = (y.transpose(0, 2, 1, 3) for y in (*heads, v))
    return queries, mx.stack([keys, values])
