"""One more token for every row, through a graph that is built once: building it can take longer than running it.

The graph holds for every place in the sequence as long as the slabs of keys and values keep their length: states go in
and come out, the offset is an array, and a mask cuts off what the slabs have not been filled with.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import mlx.core as mx

from qwen_mlx.cache.kv import TracedKVCache
from qwen_mlx.cache.recurrent import RecurrentCache
from qwen_mlx.cache.sequence import SequenceCache
from qwen_mlx.config import FULL
from qwen_mlx.model.span import Span

LayerCache = TracedKVCache | RecurrentCache
Forward = Callable[[mx.array, Sequence[LayerCache], Span], tuple[mx.array, mx.array]]


class CompiledStep:
    """`forward(tokens, caches, span)`, which gives logits [B, 1, V] and hidden [B, 1, D], compiled when slabs grow.

    The weights must be evaluated; they become part of the graph, and one that is exchanged later is not seen.
    """

    def __init__(self, forward: Forward, layer_types: Sequence[str]) -> None:
        # Not a method: the graph, which holds the weights, would be freed by the garbage collector alone.
        self._run: Callable[..., Any] = mx.compile(partial(_trace, forward, layer_types))

    def __call__(self, tokens: mx.array, cache: SequenceCache) -> tuple[mx.array, mx.array]:
        """tokens [B, 1] -> logits [B, 1, V], hidden [B, 1, D]; `cache`, which is not empty, takes them in."""
        cache.make_room()
        padding = [] if cache.left_padding is None else [cache.left_padding]
        # Of another integer type, the ids would have a graph of their own.
        logits, hidden, *arrays = self._run(tokens.astype(mx.uint32), mx.array(cache.offset), padding, cache.arrays)
        cache.advance(arrays)
        return logits, hidden


def _trace(
    forward: Forward,
    layer_types: Sequence[str],
    tokens: mx.array,
    offset: mx.array,
    padding: list[mx.array],
    arrays: list[mx.array],
) -> list[mx.array]:
    rest = iter(arrays)
    caches: list[LayerCache] = [
        TracedKVCache(next(rest), offset) if layer_type == FULL else RecurrentCache(next(rest), next(rest))
        for layer_type in layer_types
    ]
    places = mx.arange(next(c.slab.shape[3] for c in caches if isinstance(c, TracedKVCache)))
    seen = places <= offset
    for pad in padding:
        seen = seen & (places >= pad[:, None, None, None])
    attention = mx.broadcast_to(seen, (tokens.shape[0], 1, 1, places.size))
    # Whatever pads a row lies before what its cache holds: a token that is decoded is never padding.
    logits, hidden = forward(tokens, caches, Span(attention))
    return [logits, hidden, *(array for cache in caches for array in cache.arrays)]
