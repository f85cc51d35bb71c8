"""The gated feed-forward block."""

import mlx.core as mx
import mlx.nn as nn

from qwen_mlx.kernels.activations import swiglu
from qwen_mlx.model.linear import Linear
from qwen_mlx.model.projection import JointProjection


class MLP(nn.Module):
    """W_down(silu(W_gate x) * W_up x)."""

    def __init__(self, size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = Linear(size, intermediate_size)
        self.up_proj = Linear(size, intermediate_size)
        self.down_proj = Linear(intermediate_size, size)
        self._gate_and_up = JointProjection("gate_proj", "up_proj")

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(swiglu(*self._gate_and_up(self, x)))
