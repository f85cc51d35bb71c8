"""What the caches must never change: cached = uncached, in any pieces, and restored = never advanced."""

from collections.abc import Callable
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen_mlx.cache.kv import SLAB
from qwen_mlx.cache.sequence import SequenceCache
from qwen_mlx.model.qwen import Qwen
from tests.golden.checkpoints import VARIANTS

TOLERANCE = 5e-4  # the golden limit for float32 logits of up to 30
every_variant = pytest.mark.parametrize("variant", VARIANTS)
ACROSS = [
    pytest.param(10, id="first_slab"),
    pytest.param(SLAB - 2, id="before_growth"),
    pytest.param(SLAB - 1, id="last_free_place"),
    pytest.param(SLAB, id="full_slab"),
    pytest.param(SLAB + 1, id="after_growth"),
]


@pytest.fixture(scope="module")
def model(model_of: Callable[[str, str], Qwen]) -> Qwen:
    return model_of("a-r1-d32", "float32")


def prompt(tokens: int, rows: int = 1) -> mx.array:
    return mx.array(np.random.RandomState(tokens).randint(0, 352, (rows, tokens)))


def contents(cache: SequenceCache) -> list[np.ndarray]:
    """Everything a next token can see, copied: what lies behind a slab's filled part is not seen."""
    copies = []
    for layer in cache.layers:
        for array in layer.arrays:
            copies.append(np.array(array[..., : layer.offset, :] if hasattr(layer, "offset") else array, copy=True))
    return copies


def same(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    return len(one) == len(other) and all(np.array_equal(a, b) for a, b in zip(one, other))


def greedy(model: Qwen, cache: SequenceCache, count: int, *, first: int = 5) -> tuple[list[int], np.ndarray]:
    """`count` tokens behind `first`, and the last logits [V]."""
    tokens = [first]
    for _ in range(count):
        logits = model(mx.array([[tokens[-1]]]), cache)[0, -1]
        tokens.append(int(mx.argmax(logits)))
    return tokens[1:], np.array(logits)


def after(model: Qwen, tokens: int) -> SequenceCache:
    cache = model.make_cache()
    model(prompt(tokens), cache)
    mx.eval(cache.arrays)
    return cache


@every_variant
def test_token_by_token_equals_one_pass(variant: str, model_of: Callable[[str, str], Qwen]) -> None:
    model, tokens = model_of(variant, "float32"), prompt(40)
    cache = model.make_cache()
    stepwise = mx.concatenate([model(tokens[:, i : i + 1], cache) for i in range(40)], axis=1)
    assert mx.abs(stepwise - model(tokens)).max() < TOLERANCE


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(cuts=st.sets(st.integers(1, 99), max_size=8), variant=st.sampled_from(list(VARIANTS)))
def test_any_pieces_equal_one_pass(cuts: set[int], variant: str, model_of: Callable[[str, str], Qwen]) -> None:
    model, tokens = model_of(variant, "float32"), prompt(100)
    cache = model.make_cache()
    edges = [0, *sorted(cuts), 100]
    pieces = [model(tokens[:, a:b], cache) for a, b in pairwise(edges)]
    assert mx.abs(mx.concatenate(pieces, axis=1) - model(tokens)).max() < TOLERANCE


@pytest.mark.parametrize("first", [250, 256, 257])
def test_pieces_across_the_growth_of_a_slab(model: Qwen, first: int) -> None:
    tokens, cache = prompt(270), model.make_cache()
    pieces = [model(tokens[:, :first], cache), model(tokens[:, first:], cache)]
    assert mx.abs(mx.concatenate(pieces, axis=1) - model(tokens)).max() < TOLERANCE


@pytest.mark.parametrize("pieces", [(20, 13), (1, 32), (32, 1), (11, 11, 11)])
def test_a_padded_batch_in_pieces(model: Qwen, pieces: tuple[int, ...]) -> None:
    tokens, padding = prompt(33, rows=3), [0, 14, 28]
    cache = model.make_cache(padding)
    edges = np.cumsum([0, *pieces])
    last = [model(tokens[:, a:b], cache) for a, b in pairwise(edges)][-1][:, -1]
    alone = mx.concatenate([model(tokens[i : i + 1, pad:])[:, -1] for i, pad in enumerate(padding)])
    assert mx.abs(last - alone).max() < TOLERANCE


@every_variant
def test_restored_is_never_advanced(variant: str, model_of: Callable[[str, str], Qwen]) -> None:
    model = model_of(variant, "float32")
    cache = after(model, 30)
    before, snapshot = contents(cache), cache.snapshot()
    greedy(model, cache, 5)
    assert not same(contents(cache), before)
    cache.restore(snapshot)
    assert cache.offset == 30
    assert same(contents(cache), before)


@every_variant
def test_restored_continues_as_if_never_advanced(variant: str, model_of: Callable[[str, str], Qwen]) -> None:
    model = model_of(variant, "float32")
    cache = after(model, 30)
    snapshot = cache.snapshot()
    greedy(model, cache, 5, first=99)
    cache.restore(snapshot)
    tokens, logits = greedy(model, cache, 8)
    expected_tokens, expected_logits = greedy(model, after(model, 30), 8)
    assert tokens == expected_tokens
    assert np.array_equal(logits, expected_logits)


@pytest.mark.parametrize("length", ACROSS)
@pytest.mark.parametrize("steps", [1, 3])
def test_snapshot_outlives_writes_and_growth(model: Qwen, length: int, steps: int) -> None:
    cache = after(model, length)
    before, snapshot = contents(cache), cache.snapshot()
    greedy(model, cache, steps, first=99)
    cache.restore(snapshot)
    assert same(contents(cache), before)


@pytest.mark.parametrize("length", [10, SLAB - 1, SLAB])
def test_snapshot_can_be_restored_again_and_again(model: Qwen, length: int) -> None:
    cache = after(model, length)
    before, snapshot = contents(cache), cache.snapshot()
    for first in (99, 7):
        cache.restore(snapshot)
        greedy(model, cache, 3, first=first)
    cache.restore(snapshot)
    assert same(contents(cache), before)


@pytest.mark.parametrize("length", ACROSS)
def test_a_later_snapshot_outlives_another_way_from_an_earlier_one(model: Qwen, length: int) -> None:
    cache = after(model, length)
    early = cache.snapshot()
    greedy(model, cache, 2)
    late, before = cache.snapshot(), contents(cache)
    cache.restore(early)
    greedy(model, cache, 4, first=99)
    cache.restore(late)
    assert same(contents(cache), before)


@pytest.mark.parametrize("length", ACROSS)
def test_two_caches_go_their_own_ways_from_one_snapshot(model: Qwen, length: int) -> None:
    one, other = after(model, length), model.make_cache()
    other.restore(one.snapshot())
    greedy(model, one, 3, first=7)
    before = contents(one)
    greedy(model, other, 3, first=99)
    assert same(contents(one), before)


def test_snapshot_taken_before_anything_is_computed(model: Qwen) -> None:
    cache, tokens = model.make_cache(), prompt(20)
    model(tokens, cache)
    snapshot = cache.snapshot()
    model(mx.array([[99]]), cache)
    mx.eval(cache.arrays)
    cache.restore(snapshot)
    assert same(contents(cache), contents(after(model, 20)))


def test_snapshot_of_an_empty_cache(model: Qwen) -> None:
    cache = model.make_cache()
    snapshot = cache.snapshot()
    model(prompt(20), cache)
    cache.restore(snapshot)
    assert (cache.offset, cache.arrays, cache.nbytes) == (0, [], 0)


def test_snapshot_of_a_batch(model: Qwen) -> None:
    cache = model.make_cache([0, 5])
    model(prompt(20, rows=2), cache)
    before, snapshot = contents(cache), cache.snapshot()
    model(mx.array([[3], [4]]), cache)
    mx.eval(cache.arrays)
    cache.restore(snapshot)
    assert same(contents(cache), before)


def test_a_snapshot_copies_nothing(model: Qwen) -> None:
    cache = after(model, 200)
    before = mx.get_active_memory()
    snapshots = [cache.snapshot().layers for _ in range(10)]
    mx.eval(snapshots)
    assert mx.get_active_memory() - before < cache.nbytes // 10


@pytest.mark.parametrize("steps", [(1,), (7,), (1, 1, 1), (255, 1), (256, 1), (300, 5)])
def test_offset_counts_the_tokens(model: Qwen, steps: tuple[int, ...]) -> None:
    cache = model.make_cache()
    for count in steps:
        model(prompt(count), cache)
    assert cache.offset == sum(steps)


@pytest.mark.parametrize(("tokens", "slabs"), [(1, 1), (SLAB, 1), (SLAB + 1, 2), (2 * SLAB + 1, 3)])
@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_nbytes_follows_from_the_sizes(
    model_of: Callable[[str, str], Qwen], tokens: int, slabs: int, dtype: str, size: int
) -> None:
    """f-k32-v64: three linear layers with Hk 2, Hv 4, Dk 32, Dv 64 and one attention layer with Hkv 2, Dh 64."""
    model = model_of("f-k32-v64", dtype)
    cache = model.make_cache()
    model(prompt(tokens), cache)
    states, windows = 3 * 4 * 64 * 32 * 4, 3 * 3 * (2 * 2 * 32 + 4 * 64) * size
    assert cache.nbytes == states + windows + 2 * 2 * 64 * slabs * SLAB * size


def test_nbytes_does_not_change_with_what_is_written_into_a_slab(model: Qwen) -> None:
    cache = after(model, 10)
    before = cache.nbytes
    greedy(model, cache, 3)
    assert cache.nbytes == before
