"""Rotary positions: the text form, the interleaved three-axis form that images need, and YaRN for long contexts.

Half-split pairs (j, j + R/2) of the first R of the head's dimensions; the rest passes through. Angles in float32.
"""

import math

import mlx.core as mx
import numpy as np

from qwen_mlx.config import RopeParameters, Yarn


class RotaryEmbedding:
    """inv_j = theta^(-2j/R); Qwen's interleaved multi-axis RoPE (reference: `Qwen3_5TextRotaryEmbedding`).

    A position is a triple (t, h, w). Frequency j turns with h where j mod 3 = 1 and j < 3 * section[1], with w where
    j mod 3 = 2 and j < 3 * section[2], and with t elsewhere. In text t = h = w, and this is plain RoPE. With YaRN the
    frequencies are others, and what is rotated is `scale` times as long.
    """

    def __init__(self, rotary_dim: int, parameters: RopeParameters) -> None:
        self.dims = rotary_dim
        self.base = parameters.rope_theta
        self.scale = parameters.yarn.attention_factor if parameters.yarn else 1.0
        frequencies = inverse_frequencies(rotary_dim, parameters)
        self.frequencies = mx.array(frequencies.astype(np.float32))  # [R/2]
        self._periods = mx.array((1 / frequencies).astype(np.float32)) if parameters.yarn else None
        j = np.arange(rotary_dim // 2)
        _, height, width = parameters.mrope_section
        self._axis = np.where((j % 3 == 1) & (j < 3 * height), 1, np.where((j % 3 == 2) & (j < 3 * width), 2, 0))

    def __call__(self, x: mx.array, offset: int | mx.array, positions: mx.array | None = None) -> mx.array:
        """Rotate x [B, H, T, Dh]: token t stands at `offset + t`, or at `positions` [3, B, T] where they are given."""
        if positions is None:
            base = self.base if self._periods is None else None
            x = x if self.scale == 1 else x * self.scales(x.shape[-1]).astype(x.dtype)
            return mx.fast.rope(
                x, self.dims, traditional=False, base=base, scale=1.0, offset=offset, freqs=self._periods
            )
        axes = mx.moveaxis(positions.astype(mx.float32), 0, -1)[..., mx.array(self._axis)]  # [B, T, R/2]
        return self._rotated(x, (axes * self.frequencies)[:, None], self.scale)

    def turned(self, x: mx.array, places: int) -> mx.array:
        """x [B, H, T, Dh], which is rotated already, for tokens that stand `places` further on, or back."""
        return self._rotated(x, places * self.frequencies, 1.0)

    def _rotated(self, x: mx.array, angles: mx.array, scale: float) -> mx.array:
        """By `angles`, which have R/2 on their last axis."""
        half = self.dims // 2
        cos, sin = scale * mx.cos(angles), scale * mx.sin(angles)
        left, right = (x[..., a : a + half].astype(mx.float32) for a in (0, half))
        turned = mx.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
        return mx.concatenate([turned.astype(x.dtype), x[..., self.dims :]], axis=-1)

    def scales(self, head_dim: int) -> mx.array:
        """[Dh] float32: `scale` where a head is rotated, 1 behind it."""
        return mx.where(mx.arange(head_dim) < self.dims, self.scale, 1.0)


def inverse_frequencies(rotary_dim: int, parameters: RopeParameters) -> np.ndarray:
    """[R/2] float64: theta^(-2j/R), and with YaRN (arXiv 2309.00071, section 3.2) slower ones from some j on.

    A frequency that turns more than beta_fast times within the original length stays what it is, one that turns less
    than beta_slow times is divided by the factor, and a ramp over j lies between the two.
    """
    j = np.arange(rotary_dim // 2)
    plain = parameters.rope_theta ** (-2 * j / rotary_dim)
    if parameters.yarn is None:
        return plain
    low, high = _ramp(rotary_dim, parameters.rope_theta, parameters.yarn)
    slowed = np.clip((j - low) / (high - low), 0, 1)
    return plain * (1 - slowed) + plain / parameters.yarn.factor * slowed


def _ramp(rotary_dim: int, theta: float, yarn: Yarn) -> tuple[float, float]:
    """The j, not always whole, where the ramp begins and ends."""

    def place(turns: float) -> float:
        length = yarn.original_max_position_embeddings / (2 * math.pi * turns)
        return rotary_dim * math.log(length) / (2 * math.log(theta))

    low, high = place(yarn.beta_fast), place(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    return low, high if high != low else high + 0.001  # as transformers divides
