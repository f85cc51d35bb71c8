"""The slab of keys and values: what is written, what attention is given to read, and how."""

import mlx.core as mx
import numpy as np
import pytest

from qwen_mlx.bench.launch_count import launches
from qwen_mlx.cache.kv import SLAB, KVCache, TracedKVCache

B, H, D = 2, 3, 8


def tokens(count: int, seed: int = 0) -> mx.array:
    """[2, B, H, count, D]"""
    x = mx.random.normal((2, B, H, count, D), key=mx.random.key(seed))
    mx.eval(x)
    return x


def same(x: mx.array, y: mx.array) -> bool:
    return bool(mx.array_equal(x, y).item())


@pytest.mark.parametrize("pieces", [(1,), (5, 1, 1), (SLAB, 1), (SLAB - 1, 1, 1), (2 * SLAB + 3, 5)])
def test_update_returns_all_that_was_put_in(pieces: tuple[int, ...]) -> None:
    cache, whole = KVCache(), [tokens(count, seed) for seed, count in enumerate(pieces)]
    held = [cache.update(piece) for piece in whole][-1]
    expected = mx.concatenate(whole, axis=3)
    assert same(mx.stack(held), expected)
    assert cache.keys is not None
    assert cache.values is not None
    assert same(mx.stack([cache.keys, cache.values])[..., : cache.offset, :], expected)


def test_nothing_is_held_at_first() -> None:
    cache = KVCache()
    assert (cache.keys, cache.values, cache.arrays, cache.offset) == (None, None, [], 0)


def test_attention_needs_no_copy() -> None:
    """MLX's attention takes strided keys and values if batch and heads can be walked as one axis, D by ones."""
    cache = KVCache()
    for x in cache.update(tokens(10)):
        mx.eval(x)
        batch, head, token, element = memoryview(x).strides
        assert (batch, head, token, element) == (H * SLAB * D * 4, SLAB * D * 4, D * 4, 4)


def test_a_token_is_written_by_one_operation_and_read_by_views() -> None:
    cache = KVCache()
    cache.update(tokens(5))
    mx.eval(cache.arrays)
    assert launches(cache.update(tokens(1))) == {"write of keys and values": 1}


def test_in_a_graph_the_offset_is_an_array_and_takes_a_launch_of_its_own() -> None:
    cache = KVCache()
    cache.update(tokens(5))
    mx.eval(cache.arrays)
    traced = TracedKVCache(cache.arrays[0], mx.array(5))
    token = tokens(1, seed=9)
    keys, values = traced.update(token)
    assert launches([keys, values]) == {"write of keys and values": 2}
    assert np.array_equal(np.array(mx.stack([keys, values]))[..., 5:6, :], np.array(token))
    assert same(traced.arrays[0][..., :5, :], cache.arrays[0][..., :5, :])
