"""Mixture of experts with a shared expert (`Qwen3_5MoeSparseMoeBlock`)."""

import mlx.core as mx
import mlx.nn as nn

from qwen_mlx.config import MoeConfig
from qwen_mlx.kernels.activations import sigmoid, swiglu
from qwen_mlx.kernels.backend import gpu_generation
from qwen_mlx.model.linear import Linear
from qwen_mlx.model.mlp import MLP

SORT_FROM = 64  # routed rows that are worth grouping by expert; mlx-lm's figure


class ExpertLinear(nn.Module):
    """One matrix an expert, [E, out, in]; each row of x meets the matrix of its own expert."""

    def __init__(self, experts: int, size: int, out: int) -> None:
        super().__init__()
        self.weight = mx.zeros((experts, out, size))

    def __call__(self, x: mx.array, experts: mx.array, *, ordered: bool) -> mx.array:
        weight = self.weight.swapaxes(-1, -2)
        if gpu_generation() is None:  # MLX gathers matrices in float32 only, without Metal
            wide = mx.gather_mm(x.astype(mx.float32), weight.astype(mx.float32), rhs_indices=experts)
            return wide.astype(x.dtype)
        return mx.gather_mm(x, weight, rhs_indices=experts, sorted_indices=ordered)

    def to_quantized(self, *, group_size: int, bits: int, mode: str) -> "QuantizedExpertLinear":
        return QuantizedExpertLinear(self.weight, group_size, bits, mode)


class QuantizedExpertLinear(nn.Module):
    """`ExpertLinear` with weights as `mx.quantize` stores them."""

    def __init__(self, weight: mx.array, group_size: int, bits: int, mode: str) -> None:
        super().__init__()
        self.group_size, self.bits, self.mode = group_size, bits, mode
        self.weight, self.scales, *biases = mx.quantize(weight, group_size, bits, mode=mode)
        self.biases = biases[0] if biases else None

    def __call__(self, x: mx.array, experts: mx.array, *, ordered: bool) -> mx.array:
        return mx.gather_qmm(
            x,
            self.weight,
            self.scales,
            self.biases,
            rhs_indices=experts,
            transpose=True,
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
            sorted_indices=ordered,
        )


class Experts(nn.Module):
    """The feed-forward block of every expert."""

    def __init__(self, experts: int, size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = ExpertLinear(experts, size, intermediate_size)
        self.up_proj = ExpertLinear(experts, size, intermediate_size)
        self.down_proj = ExpertLinear(experts, intermediate_size, size)

    def __call__(self, x: mx.array, experts: mx.array) -> mx.array:
        """x [N, D], experts [N, k] -> [N, k, D], one answer for each chosen expert."""
        N, k = experts.shape
        flat, order = experts.flatten(), mx.arange(N * k)
        ordered = N * k >= SORT_FROM
        if ordered:
            order = mx.argsort(flat)
            flat = flat[order]
        rows = x[order // k][:, None]
        hidden = swiglu(self.gate_proj(rows, flat, ordered=ordered), self.up_proj(rows, flat, ordered=ordered))
        out = self.down_proj(hidden, flat, ordered=ordered)[:, 0]
        if ordered:
            out = out[mx.argsort(order)]
        return out.reshape(N, k, -1)


class SparseMoeBlock(nn.Module):
    """Sum over the top-k experts, weighted by softmax over all and renormalised, plus sigmoid(w_s x) * shared(x)."""

    def __init__(self, size: int, config: MoeConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.gate = Linear(size, config.num_experts)
        self.switch_mlp = Experts(config.num_experts, size, config.moe_intermediate_size)
        self.shared_expert = MLP(size, config.shared_expert_intermediate_size)
        self.shared_expert_gate = Linear(size, 1)

    def __call__(self, x: mx.array) -> mx.array:
        B, T, D = x.shape
        rows = x.reshape(-1, D)
        # Renormalised over the chosen ones, the softmax over all experts is the softmax over the chosen.
        scores = self.gate(rows).astype(mx.float32)
        chosen = mx.argpartition(-scores, self.top_k - 1, axis=-1)[:, : self.top_k]
        weights = mx.softmax(mx.take_along_axis(scores, chosen, axis=-1), axis=-1)
        routed = (self.switch_mlp(rows, chosen) * weights[..., None]).sum(axis=1)
        shared = sigmoid(self.shared_expert_gate(rows)) * self.shared_expert(rows)
        return (routed + shared).astype(x.dtype).reshape(B, T, D)
