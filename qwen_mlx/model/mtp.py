"""The draft head of the checkpoints (`mtp.*`): from what the model knows now, the token after the next one."""

import mlx.core as mx
import mlx.nn as nn

from qwen_mlx.cache.kv import KVCache
from qwen_mlx.config import FULL, TextConfig
from qwen_mlx.model.decoder import DecoderLayer
from qwen_mlx.model.linear import Linear
from qwen_mlx.model.norm import RMSNorm
from qwen_mlx.model.span import make_span


class MTPHead(nn.Module):
    """y = norm(layer(W_fc [norm_e(e), norm_h(h)])): multi-token prediction by one more full-attention layer.

    Slot i takes h, the model's hidden state i after its final norm, and e, the embedding of token i + 1; from y the
    model's own output matrix makes the logits of token i + 2. For a further draft the next slot takes this y as its h,
    and the embedding of the token just drafted. (DeepSeek-V3, arXiv 2412.19437, section 2.2, sharing one head for all
    depths; transformers leaves it out, vLLM has it in `qwen3_5_mtp.py`.)
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        D, eps = config.hidden_size, config.rms_norm_eps
        self.pre_fc_norm_embedding = RMSNorm(D, eps)
        self.pre_fc_norm_hidden = RMSNorm(D, eps)
        self.fc = Linear(2 * D, D)
        self.layers = [DecoderLayer(config, FULL)]
        self.norm = RMSNorm(D, eps)

    def make_cache(self) -> KVCache:
        """An empty cache. It counts slots: slot i stands at position i, the first of them 0."""
        return KVCache()

    def __call__(self, hidden: mx.array, next_embeddings: mx.array, cache: KVCache) -> mx.array:
        """hidden, next_embeddings [B, T, D] -> y [B, T, D], after the head's norm; the cache takes the T slots in."""
        both = [self.pre_fc_norm_embedding(next_embeddings), self.pre_fc_norm_hidden(hidden)]
        x = self.fc(mx.concatenate(both, axis=-1))
        x, update = self.layers[0](x, None, cache, make_span(x.shape[1], cache.offset))
        return self.norm.of_sum(x, update)[1]
