"""Attention to quantized keys and values: MLX has no fused form of it, so the scores are written out."""

import mlx.core as mx

from qwen_mlx.cache.quantized_kv import Quantized


def quantized_attention(
    q: mx.array, keys: Quantized, values: Quantized, *, scale: float, mask: mx.array | str | None
) -> mx.array:
    """softmax(scale q k^T) v for q [B, Hq, T, Dh] -> [B, Hq, T, Dh]; softmax in float32.

    mask: "causal" (the queries are the last tokens of the keys), None, or bool [B, 1, T, S].
    """
    B, Hq, T, Dh = q.shape
    Hkv, S = keys.packed.shape[1:3]
    # The query heads of one key head are rows of one matmul: keys and values are met once.
    rows = (scale * q).reshape(B, Hkv, Hq // Hkv * T, Dh)
    scores = _matmul(rows, keys, transpose=True).reshape(B, Hq, T, S)
    if isinstance(mask, str):
        mask = mx.arange(S) <= mx.arange(S - T, S)[:, None]
    if mask is not None:
        scores = mx.where(mask, scores, mx.finfo(scores.dtype).min)
    weights = mx.softmax(scores, axis=-1, precise=True).reshape(B, Hkv, Hq // Hkv * T, S)
    return _matmul(weights, values, transpose=False).reshape(B, Hq, T, Dh)


def _matmul(x: mx.array, w: Quantized, *, transpose: bool) -> mx.array:
    return mx.quantized_matmul(
        x, w.packed, w.scales, w.biases, transpose=transpose, group_size=w.group_size, bits=w.bits
    )
