"""RMSNorm with its gain in float32, whatever the activations are."""

import mlx.core as mx
import mlx.nn as nn

from qwen_mlx.kernels.activations import silu_gated
from qwen_mlx.kernels.add_rms_norm import add_rms_norm


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * gain, over the last axis; statistics, scaling and gain in float32, one rounding.

    Qwen3.5 stores w and means a gain of 1 + w (`Qwen3_5RMSNorm`); loading adds the one. In bfloat16 that sum alone
    would move the logits.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = mx.ones((size,), mx.float32)
        self.eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        # With a float32 gain, rms_norm answers in float32.
        return mx.fast.rms_norm(x, self.weight, self.eps).astype(x.dtype)

    def of_sum(self, x: mx.array, update: mx.array | None) -> tuple[mx.array, mx.array]:
        """x + update, or x without one, and its norm."""
        return (x, self(x)) if update is None else add_rms_norm(x, update, self.weight, self.eps)


class GatedRMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * gain * silu(gate), in float32 (`Qwen3_5RMSNormGated`: a plain gain)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = mx.ones((size,), mx.float32)
        self.eps = eps

    def __call__(self, x: mx.array, gate: mx.array) -> mx.array:
        normed = mx.fast.rms_norm(x.astype(mx.float32), self.weight, self.eps)
        return silu_gated(normed, gate)
