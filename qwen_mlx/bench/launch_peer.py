"""The launches of mlx-lm for the same token: its graph, with the stand-ins of `launch_count`."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import mlx.core as mx

from qwen_mlx.bench.launch_count import after, hollow, hollow_out, hollow_states, launches, stand_ins, token
from qwen_mlx.bench.model_peer import NoPeer
from qwen_mlx.cache.kv import SLAB
from qwen_mlx.config import TextConfig


def load_peer(folder: Path) -> Any:
    """mlx-lm's model of `folder`, its weights unread. Raises NoPeer."""
    if not TYPE_CHECKING:  # mlx-lm brings no types
        try:
            from mlx_lm.utils import load_model
        except ImportError as error:
            raise NoPeer(f"mlx-lm cannot be imported ({error}); run `pip install mlx-lm`.") from None
        try:
            return load_model(folder, lazy=True)[0]
        except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
            raise NoPeer(f"mlx-lm cannot load {folder}: {str(error).splitlines()[0][:200]}.") from None


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
        with stand_ins(), patch(f"{type(inner).__module__}.gated_delta_update", _rule):
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
            shape = (1, text.num_key_value_heads, SLAB, text.head_dim)
            layer.keys, layer.values, layer.offset = hollow(shape, dtype), hollow(shape, dtype), 1
        else:
            layer[0], layer[1] = hollow_states(text, dtype)


def sampled_by_peer(model: Any, tokens: mx.array, cache: list[Any]) -> list[mx.array]:
    """What `generate_step` asks for: the likeliest token, and all log-probabilities."""
    logits = model(tokens, cache=cache)[:, -1, :]
    log_probabilities = logits - mx.logsumexp(logits, keepdims=True)
    return [mx.argmax(log_probabilities, axis=-1), log_probabilities]


def _arrays(layer: Any) -> list[mx.array]:
    return [layer.keys, layer.values] if hasattr(layer, "keys") else [layer[0], layer[1]]


def _rule(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    a: mx.array,
    b: mx.array,
    A_log: mx.array,
    dt_bias: mx.array,
    *rest: Any,
    **_: Any,
) -> tuple[mx.array, mx.array]:
    """Its gates as they are, and its kernel as one launch."""
    gates = mx.sigmoid(b), _decay()(A_log, a, dt_bias)
    state = rest[0]
    o = mx.sort(after(v, q, k, *gates, state), axis=-1)
    return o, after(hollow(state.shape, state.dtype), o)


def _decay() -> Any:
    if not TYPE_CHECKING:
        from mlx_lm.models.gated_delta import compute_g

        return compute_g
