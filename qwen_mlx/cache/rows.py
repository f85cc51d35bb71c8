"""Caches of several sequences as one, whose rows come and go.

All rows end at one place: those that are shorter have padding on their left. A row that is moved by some places takes
its keys along, which were rotated for the places where they stood; `turn` (keys [B, H, T, Dh], places) rotates them on.
"""

from collections.abc import Callable, Sequence

import mlx.core as mx

from qwen_mlx.cache.kv import KVCache
from qwen_mlx.cache.recurrent import RecurrentCache
from qwen_mlx.cache.sequence import SequenceCache

Turn = Callable[[mx.array, int], mx.array]
TRIM = 256
"""Places that are padding in all rows before they are given up."""


def joined(caches: Sequence[SequenceCache], turn: Turn) -> SequenceCache:
    """One cache with the rows of all of `caches`, none of which is empty and all of one model, in order."""
    offset = max(cache.offset for cache in caches)
    rows = [_moved(cache, offset - cache.offset, turn) for cache in caches]
    padding = [
        cache.left_padding if cache.left_padding is not None else mx.zeros((_rows(cache),), mx.int32) for cache in rows
    ]
    layers: list[KVCache | RecurrentCache] = []
    for parts in zip(*(cache.layers for cache in rows)):
        if isinstance(parts[0], RecurrentCache):
            conv, recurrent = (mx.concatenate(list(arrays)) for arrays in zip(*(part.arrays for part in parts)))
            layers.append(RecurrentCache(conv, recurrent))
        else:
            layers.append(_holding(mx.concatenate([part.piece(0, offset)[0] for part in parts], axis=1)))
    return SequenceCache(layers, mx.concatenate(padding), caches[0].sizes)


def chosen(cache: SequenceCache, rows: Sequence[int], turn: Turn) -> SequenceCache:
    """A cache of those `rows` of `cache` alone, in this order; padding that all of them have is given up by TRIM."""
    assert cache.left_padding is not None
    index = mx.array(list(rows))
    padding = cache.left_padding[index]
    layers: list[KVCache | RecurrentCache] = []
    for layer in cache.layers:
        if isinstance(layer, RecurrentCache):
            conv, recurrent = layer.arrays
            layers.append(RecurrentCache(conv[index], recurrent[index]))
        else:
            layers.append(_holding(layer.piece(0, layer.offset)[0][:, index]))
    left = SequenceCache(layers, padding, cache.sizes)
    spare = int(mx.min(padding).item())  # type: ignore[arg-type]
    return _moved(left, -spare, turn) if spare >= TRIM else left


def _moved(cache: SequenceCache, by: int, turn: Turn) -> SequenceCache:
    """`cache` with everything `by` places further on, or nearer to the beginning if its padding has room for that."""
    if not by:
        return cache
    layers: list[KVCache | RecurrentCache] = []
    for layer in cache.layers:
        if isinstance(layer, RecurrentCache):
            layers.append(layer)
            continue
        (slab,) = layer.piece(max(-by, 0), layer.offset)
        slab = mx.stack([turn(slab[0], by), slab[1]])
        before = mx.zeros((*slab.shape[:3], max(by, 0), slab.shape[4]), slab.dtype)
        layers.append(_holding(mx.concatenate([before, slab], axis=3)))
    padding = mx.zeros((_rows(cache),), mx.int32) if cache.left_padding is None else cache.left_padding
    return SequenceCache(layers, padding + by, cache.sizes)


def _holding(slab: mx.array) -> KVCache:
    layer = KVCache()
    layer.fill([[slab]], slab.shape[3])
    return layer


def _rows(cache: SequenceCache) -> int:
    return next(layer.arrays[0].shape[0] for layer in cache.layers if isinstance(layer, RecurrentCache))
