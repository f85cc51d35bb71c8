"""Embeddings to hidden states: the stack of layers and the final norm."""

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from qwen_mlx.cache.kv import KVCache, TracedKVCache
from qwen_mlx.cache.recurrent import RecurrentCache
from qwen_mlx.config import FULL, TextConfig
from qwen_mlx.model.attention import Attention
from qwen_mlx.model.gated_deltanet import GatedDeltaNet
from qwen_mlx.model.linear import Embedding
from qwen_mlx.model.mlp import MLP
from qwen_mlx.model.moe import SparseMoeBlock
from qwen_mlx.model.norm import RMSNorm
from qwen_mlx.model.span import Span

LayerCache = KVCache | TracedKVCache | RecurrentCache


class DecoderLayer(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)), the last sum left to the norm that comes next: it adds along."""

    def __init__(self, config: TextConfig, layer_type: str) -> None:
        super().__init__()
        D, eps = config.hidden_size, config.rms_norm_eps
        if layer_type == FULL:
            self.self_attn = Attention(config)
        else:
            self.linear_attn = GatedDeltaNet(config)
        self.mlp = SparseMoeBlock(D, config.moe) if config.moe else MLP(D, config.intermediate_size)
        self.input_layernorm = RMSNorm(D, eps)
        self.post_attention_layernorm = RMSNorm(D, eps)

    def __call__(
        self, x: mx.array, update: mx.array | None, cache: LayerCache, span: Span
    ) -> tuple[mx.array, mx.array]:
        """The residual stream x [B, T, D] and what the layer before adds to it -> the same of this layer."""
        x, normed = self.input_layernorm.of_sum(x, update)
        if isinstance(cache, RecurrentCache):
            mixed = self.linear_attn(normed, cache, span.tokens, span.cuts)
        else:
            mixed = self.self_attn(normed, cache, span.attention, span.positions)
        x, normed = self.post_attention_layernorm.of_sum(x, mixed)
        return x, self.mlp(normed)


class Decoder(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = [DecoderLayer(config, layer_type) for layer_type in config.layer_types]
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def __call__(self, x: mx.array, caches: Sequence[LayerCache], span: Span) -> mx.array:
        """x [B, T, D] -> [B, T, D], after the final norm; `caches` one for each layer."""
        update = None
        for layer, layer_cache in zip(self.layers, caches):
            x, update = layer(x, update, layer_cache, span)
        return self.norm.of_sum(x, update)[1]
