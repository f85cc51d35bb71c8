"""Rotary positions: the text form, and the interleaved three-axis form that images need.

Half-split pairs (j, j + R/2) of the first R of the head's dimensions; the rest passes through. Angles in float32.
"""

import mlx.core as mx
import numpy as np

from qwen_mlx.config import RopeParameters


class RotaryEmbedding:
    """inv_j = theta^(-2j/R); Qwen's interleaved multi-axis RoPE (reference: `Qwen3_5TextRotaryEmbedding`).

    A position is a triple (t, h, w). Frequency j turns with h where j mod 3 = 1 and j < 3 * section[1], with w where
    j mod 3 = 2 and j < 3 * section[2], and with t elsewhere. In text t = h = w, and this is plain RoPE.
    """

    def __init__(self, rotary_dim: int, parameters: RopeParameters) -> None:
        self.dims = rotary_dim
        self.base = parameters.rope_theta
        j = np.arange(rotary_dim // 2)
        _, height, width = parameters.mrope_section
        self._axis = np.where((j % 3 == 1) & (j < 3 * height), 1, np.where((j % 3 == 2) & (j < 3 * width), 2, 0))

    def __call__(self, x: mx.array, offset: int | mx.array, positions: mx.array | None = None) -> mx.array:
        """Rotate x [B, H, T, Dh]: token t stands at `offset + t`, or at `positions` [3, B, T] where they are given."""
        if positions is None:
            return mx.fast.rope(x, self.dims, traditional=False, base=self.base, scale=1.0, offset=offset)
        half = self.dims // 2
        inverse = mx.power(self.base, -mx.arange(half, dtype=mx.float32) / half)
        axes = mx.moveaxis(positions.astype(mx.float32), 0, -1)[..., mx.array(self._axis)]  # [B, T, R/2]
        angles = (axes * inverse)[:, None]  # [B, 1, T, R/2]
        cos, sin = mx.cos(angles), mx.sin(angles)
        left, right = (x[..., a : a + half].astype(mx.float32) for a in (0, half))
        turned = mx.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
        return mx.concatenate([turned.astype(x.dtype), x[..., self.dims :]], axis=-1)
