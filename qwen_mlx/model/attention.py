"""Full attention with an output gate (`Qwen3_5Attention`)."""

import mlx.core as mx
import mlx.nn as nn

from qwen_mlx.cache.kv import KVCache, TracedKVCache
from qwen_mlx.cache.quantized_kv import QuantizedKVCache
from qwen_mlx.config import TextConfig
from qwen_mlx.kernels.activations import sigmoid_gated
from qwen_mlx.kernels.qk_norm_rope import HeadNorms, heads_are_fused, qk_norm_rope
from qwen_mlx.model.linear import Linear
from qwen_mlx.model.norm import RMSNorm
from qwen_mlx.model.projection import JointProjection
from qwen_mlx.model.quantized_attention import quantized_attention
from qwen_mlx.model.rope import RotaryEmbedding


class Attention(nn.Module):
    """out = W_o (softmax(q k^T / sqrt(Dh)) v * sigmoid(gate)); q and gate come from one projection, per head."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        D, Dh = config.hidden_size, config.head_dim
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_attention_heads, config.num_key_value_heads, Dh
        self.q_proj = Linear(D, self.num_heads * 2 * Dh)
        self.k_proj = Linear(D, self.num_kv_heads * Dh)
        self.v_proj = Linear(D, self.num_kv_heads * Dh)
        self.o_proj = Linear(self.num_heads * Dh, D)
        self.q_norm = RMSNorm(Dh, config.rms_norm_eps)
        self.k_norm = RMSNorm(Dh, config.rms_norm_eps)
        self._qkv = JointProjection("q_proj", "k_proj", "v_proj")
        self._rope = RotaryEmbedding(config.rotary_dim, config.rope_parameters)

    def __call__(
        self, x: mx.array, cache: KVCache | TracedKVCache, mask: mx.array | str | None, positions: mx.array | None
    ) -> mx.array:
        """x [B, T, D] -> [B, T, D]; mask: "causal", None (one token), or bool [B, 1, T, S]; positions as in `rope`."""
        B, T, _ = x.shape
        q_and_gate, k, v = self._qkv(self, x)
        q_and_gate = q_and_gate.reshape(B, T, self.num_heads, 2 * self.head_dim)
        q, gate = mx.split(q_and_gate, 2, axis=-1)
        k, v = (y.reshape(B, T, self.num_kv_heads, self.head_dim) for y in (k, v))
        if positions is None and heads_are_fused(self.head_dim, self._rope.dims):
            q, keys_values = qk_norm_rope(q_and_gate, k, v, self._head_norms(), cache.offset)
        else:
            q, k, v = (y.transpose(0, 2, 1, 3) for y in (self.q_norm(q), self.k_norm(k), v))  # [B, H, T, Dh]
            q, k = (self._rope(y, cache.offset, positions) for y in (q, k))
            keys_values = mx.stack([k, v])
        scale = self.head_dim**-0.5
        if isinstance(cache, QuantizedKVCache):
            o = quantized_attention(q, *cache.update(keys_values), scale=scale, mask=mask)
        else:
            k, v = cache.update(keys_values)
            o = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
        return self.o_proj(sigmoid_gated(o.transpose(0, 2, 1, 3), gate).reshape(B, T, -1))

    def turned(self, keys: mx.array, places: int) -> mx.array:
        """Keys as they are cached, for tokens that stand `places` further on, or back."""
        return self._rope.turned(keys, places)

    def _head_norms(self) -> HeadNorms:
        gains = self.q_norm.weight, self.k_norm.weight
        if self._rope.scale != 1:  # with YaRN, two launches more: a rotation leaves a factor what it is
            gains = (gains[0] * self._rope.scales(self.head_dim), gains[1] * self._rope.scales(self.head_dim))
        return HeadNorms(*gains, self.q_norm.eps, self._rope.frequencies)
