"""The launches of mlx-lm for the same token: its graph, with the stand-ins of `launch_count`."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import mlx.core as mx

from qwen_mlx.bench.launch_count import (
    hollow,
    hollow_heads,
    hollow_out,
    hollow_states,
    launches,
    one_launch,
    stand_ins,
    token,
)
from qwen_mlx.config import TextConfig


def count_peer_step(model: Any, text: TextConfig, layers: Sequence[int] | None = None) -> Counter[str]:
    """As `count_step`, of mlx-lm's `model`, which samples from log-probabilities and hands them out."""
    hollow_out(model)
    inner = model.language_model.model
    dtype = inner.norm.weight.dtype
    kept = inner.layers, inner.ssm_idx, inner.fa_idx
    places = list(range(len(inner.layers)) if layers is None else layers)
    inner.layers = [inner.layers[i] for i in places]
    linear = [layer.is_linear for layer in inner.layers]
    inner.ssm_idx, inner.fa_idx = linear.index(True), linear.index(False)
    try:
        with stand_ins(), peer_stand_in():
            cache = model.make_cache()
            hollow_peer_cache(cache, text, dtype)
            sampled = sampled_by_peer(model, token(), cache)
            return launches([*sampled, *(array for layer in cache for array in _arrays(layer))])
    finally:
        inner.layers, inner.ssm_idx, inner.fa_idx = kept


def hollow_peer_cache(cache: list[Any], text: TextConfig, dtype: mx.Dtype) -> None:
    """Make of its cache one that holds a token."""
    for layer in cache:
        if hasattr(layer, "keys"):
            layer.keys, layer.values = (hollow(hollow_heads(text), dtype) for _ in range(2))
            layer.offset = 1
        else:
            layer[0], layer[1] = hollow_states(text, dtype)


def sampled_by_peer(model: Any, tokens: mx.array, cache: list[Any]) -> list[mx.array]:
    """What `generate_step` asks for: the likeliest token, and all log-probabilities."""
    logits = model(tokens, cache=cache)[:, -1, :]
    log_probabilities = logits - mx.logsumexp(logits, keepdims=True)
    return [mx.argmax(log_probabilities, axis=-1), log_probabilities]


def _arrays(layer: Any) -> list[mx.array]:
    return [layer.keys, layer.values] if hasattr(layer, "keys") else [layer[0], layer[1]]


@contextmanager
def peer_stand_in() -> Iterator[None]:
    """The delta rule of mlx-lm: its gates as they are, and its kernel as one launch."""
    compute_g = _decay()

    def rule(q: mx.array, k: mx.array, v: mx.array, a: mx.array, b: mx.array, *rest: Any, **__: Any) -> list[mx.array]:
        A_log, dt_bias, state, *_ = rest
        return one_launch([v, state], q, k, mx.sigmoid(b), compute_g(A_log, a, dt_bias))

    with patch("mlx_lm.models.qwen3_5.gated_delta_update", rule):
        yield


def _decay() -> Any:
    if not TYPE_CHECKING:  # mlx-lm brings no types
        from mlx_lm.models.gated_delta import compute_g

        return compute_g
