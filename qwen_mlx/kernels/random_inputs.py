"""Random inputs of the kernels in the sizes of a model, always the same ones: for the check at load and the bench.

Projected channels, taps and kept columns have the dtype of activations, all else is float32, as in the model.
"""

from dataclasses import dataclass

import mlx.core as mx

from qwen_mlx.kernels.causal_conv1d import l2_norm
from qwen_mlx.kernels.gated_delta_step import StepWeights
from qwen_mlx.kernels.qk_norm_rope import HeadNorms

EPS = 1e-6
THETA = 1e7  # of the rotation


@dataclass(frozen=True)
class Sizes:
    """Of a model's Gated DeltaNet layers: heads, their sizes, convolution taps, and the dtype of activations."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    taps: int
    dtype: mx.Dtype

    @property
    def heads(self) -> tuple[int, int, int, int]:
        """Hk, Hv, Dv, Dk, as `kernels_fit` takes them."""
        return self.key_heads, self.value_heads, self.value_dim, self.key_dim

    @property
    def channels(self) -> int:
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim


@dataclass(frozen=True)
class AttentionSizes:
    """Of a model's residual stream and full-attention layers, and the dtype of activations."""

    hidden_size: int
    query_heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    dtype: mx.Dtype


def random_state(sizes: Sizes) -> mx.array:
    """[1, Hv, Dv, Dk]"""
    return 0.3 * _normal(0, 1, sizes.value_heads, sizes.value_dim, sizes.key_dim)


def random_tokens(sizes: Sizes, T: int) -> tuple[mx.array, mx.array, mx.array, mx.array, mx.array, mx.array]:
    """q, k, v, g, beta of T tokens, and the state before them; a memory of about ten tokens."""
    q, k = (l2_norm(_normal(i, 1, T, sizes.key_heads, sizes.key_dim)) for i in (1, 2))
    v = _normal(3, 1, T, sizes.value_heads, sizes.value_dim)
    decay, beta = (mx.random.uniform(shape=v.shape[:3], key=mx.random.key(i)) for i in (4, 5))
    return q * sizes.key_dim**-0.5, k, v, -0.2 * decay, beta, random_state(sizes)


def random_columns(sizes: Sizes, T: int) -> tuple[mx.array, mx.array, mx.array]:
    """x [1, T, Cn], taps [Cn, K], conv_state [1, K-1, Cn]."""
    x, taps = _normal(1, 1, T, sizes.channels), _normal(2, sizes.channels, sizes.taps)
    kept = _normal(3, 1, sizes.taps - 1, sizes.channels)
    return x.astype(sizes.dtype), taps.astype(sizes.dtype), kept.astype(sizes.dtype)


def random_step(
    sizes: Sizes,
) -> tuple[tuple[mx.array, mx.array, mx.array, mx.array], StepWeights, mx.array, mx.array]:
    """The arguments of `gated_delta_step`."""
    heads, wide = sizes.value_heads, sizes.value_heads * sizes.value_dim
    z, a, b = (_normal(i, 1, 1, size).astype(sizes.dtype) for i, size in ((4, wide), (5, heads), (6, heads)))
    A_log, dt_bias, gain = _normal(7, heads), _normal(8, heads), 1 + 0.1 * _normal(9, sizes.value_dim)
    qkv, taps, conv_state = random_columns(sizes, 1)
    return (qkv, z, a, b), StepWeights(taps, A_log, dt_bias, gain, EPS), conv_state, random_state(sizes)


def random_sum(sizes: AttentionSizes) -> tuple[mx.array, mx.array, mx.array, float]:
    """The arguments of `add_rms_norm` for one token."""
    x, update = (_normal(i, 1, 1, sizes.hidden_size).astype(sizes.dtype) for i in (1, 2))
    return x, update, 1 + 0.1 * _normal(3, sizes.hidden_size), EPS


def random_heads(sizes: AttentionSizes) -> tuple[mx.array, mx.array, mx.array, HeadNorms, int]:
    """The arguments of `qk_norm_rope` for one token at some place."""
    q = _normal(1, 1, 1, sizes.query_heads, 2 * sizes.head_dim).astype(sizes.dtype)
    k, v = (_normal(i, 1, 1, sizes.kv_heads, sizes.head_dim).astype(sizes.dtype) for i in (2, 5))
    q_gain, k_gain = (1 + 0.1 * _normal(i, sizes.head_dim) for i in (3, 4))
    frequencies = mx.array([THETA ** (-j / sizes.rotary_dim) for j in range(0, sizes.rotary_dim, 2)], mx.float32)
    return q, k, v, HeadNorms(q_gain, k_gain, EPS, frequencies), 1000


def _normal(key: int, *shape: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(key))
