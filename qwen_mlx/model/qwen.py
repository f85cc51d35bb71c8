"""The text model: token ids to logits in three steps, `embed`, `hidden`, `logits`."""

from collections.abc import Sequence
from pathlib import Path
from weakref import proxy

import mlx.core as mx
import mlx.nn as nn

from qwen_mlx.cache.kv import KVCache
from qwen_mlx.cache.quantized_kv import QuantizedKVCache, quantized
from qwen_mlx.cache.recurrent import RecurrentCache
from qwen_mlx.cache.sequence import SequenceCache
from qwen_mlx.config import FULL, ModelConfig
from qwen_mlx.kernels.backend import gpu_generation
from qwen_mlx.model.decoder import Decoder, LayerCache
from qwen_mlx.model.linear import Linear
from qwen_mlx.model.span import Span, make_span
from qwen_mlx.model.step import CompiledStep


class Qwen(nn.Module):
    """Qwen3.5's hybrid decoder (`Qwen3_5ForCausalLM`, `Qwen3_5MoeForCausalLM`)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.dtype = mx.float32  # of the activations; `load` sets it, and where it found the model
        self.folder: Path | None = None
        self.model = Decoder(config.text)
        self._compiled_step: CompiledStep | None = None
        if not config.text.tie_word_embeddings:
            self.lm_head = Linear(config.text.hidden_size, config.text.vocab_size)

    def make_cache(self, left_padding: Sequence[int] | None = None, *, kv_bits: int | None = None) -> SequenceCache:
        """An empty cache; `left_padding` counts the padding tokens in front of each row of the batch.

        `kv_bits` (4 or 8) quantizes keys and values; errors as `QuantizedKVCache` has them.
        """
        kinds = self.config.text.layer_types
        layers = [KVCache() if kind == FULL else RecurrentCache() for kind in kinds]
        padding = None if left_padding is None else mx.array(list(left_padding))
        cache = SequenceCache(layers, padding, [self._size_in_words(kind) for kind in kinds])
        return cache if kv_bits is None else quantized(cache, kv_bits, self.config.text.head_dim)

    def _size_in_words(self, layer_type: str) -> str:
        text, dtype = self.config.text, str(self.dtype).removeprefix("mlx.core.")
        if layer_type == FULL:
            return f"{text.num_key_value_heads} heads of {text.head_dim} in {dtype}"
        heads, value_dim, key_dim = text.linear_num_value_heads, text.linear_value_head_dim, text.linear_key_head_dim
        channels = 2 * text.linear_num_key_heads * key_dim + heads * value_dim
        columns = f"{text.linear_conv_kernel_dim - 1} columns of {channels}"
        return f"{heads} states of {value_dim} x {key_dim} and {columns} in {dtype}"

    def embed(self, tokens: mx.array) -> mx.array:
        """tokens [B, T] -> [B, T, D]"""
        return self.model.embed_tokens(tokens).astype(self.dtype)

    def hidden(
        self, x: mx.array, cache: SequenceCache, positions: mx.array | None = None, *, marks: Sequence[int] = ()
    ) -> mx.array:
        """x [B, T, D] -> hidden states after the final norm, [B, T, D]; the cache takes the T tokens in.

        `positions` [3, B, T] (time, height, width) where images make them differ from the place in the sequence.
        Of ascending offsets, `marks`, the cache makes checkpoints where the T tokens reach or pass them. An exception,
        Ctrl-C among them, leaves the cache as it was.
        """
        start, end = cache.offset, cache.offset + x.shape[1]
        inside = [mark for mark in marks if start < mark < end]
        cuts = [mark - start for mark in inside]
        span = make_span(x.shape[1], start, left_padding=cache.left_padding, positions=positions, cuts=cuts)
        before = cache.place()
        try:
            hidden = self.model(x, cache.layers, span)
        except BaseException:  # Ctrl-C in the middle: some layers have taken the tokens in, others not
            cache.return_to(before)
            raise
        if end in marks:
            cache.checkpoint(inside)
        else:
            cache.checkpoint_passed(inside)
        return hidden

    def logits(self, hidden: mx.array) -> mx.array:
        """hidden [B, T, D] -> [B, T, V], padding rows of the vocabulary included."""
        if self.config.text.tie_word_embeddings:
            return self.model.embed_tokens.as_linear(hidden)
        return self.lm_head(hidden)

    def step(self, tokens: mx.array, cache: SequenceCache) -> tuple[mx.array, mx.array]:
        """One more token for each row behind what `cache` holds: tokens [B, 1] -> logits [B, V], hidden [B, 1, D]."""
        # Without Metal, compiling needs a C++ compiler; an empty cache has no states that could go into the graph, and
        # the graph does not know quantized keys and values.
        if gpu_generation() is None or cache.offset == 0 or any(isinstance(c, QuantizedKVCache) for c in cache.layers):
            hidden = self.hidden(self.embed(tokens), cache)
            return self.logits(hidden)[:, -1], hidden
        if self._compiled_step is None:
            mx.eval(self.parameters())
            model = proxy(self)  # the step belongs to the model, and must not keep it alive
            self._compiled_step = CompiledStep(lambda *args: model._forward(*args), self.config.text.layer_types)
        logits, hidden = self._compiled_step(tokens, cache)
        return logits[:, -1], hidden

    def _forward(self, tokens: mx.array, caches: Sequence[LayerCache], span: Span) -> tuple[mx.array, mx.array]:
        hidden = self.model(self.embed(tokens), caches, span)
        return self.logits(hidden), hidden

    def turn(self, keys: mx.array, places: int) -> mx.array:
        """keys [B, Hkv, T, Dh] of a cache, for tokens that stand `places` further on, or back: a rotation more."""
        layer = self.model.layers[self.config.text.layer_types.index(FULL)]
        return layer.self_attn.turned(keys, places)

    def __call__(self, tokens: mx.array, cache: SequenceCache | None = None) -> mx.array:
        """tokens [B, T] -> logits [B, T, V]; without a cache the sequence is forgotten."""
        return self.logits(self.hidden(self.embed(tokens), cache or self.make_cache()))
