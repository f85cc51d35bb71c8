"""What the caches must never change: cached = uncached, in any pieces, and restored = never advanced."""

import gc
from collections.abc import Callable
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen_mlx.cache.kv import SLAB, KVCache
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
            seen = array[..., : layer.offset, :] if hasattr(layer, "offset") else array
            copies.append(np.array(seen.astype(mx.float32), copy=True))  # NumPy has no bfloat16
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
    cache = after(model, 20)
    greedy(model, cache, 1)
    before = cache.nbytes
    greedy(model, cache, 3)
    assert cache.nbytes == before


F_STATES, F_WINDOWS, F_SLABS = 3 * 4 * 64 * 32 * 4, 3 * 3 * (2 * 2 * 32 + 4 * 64) * 4, 2 * 2 * 64 * SLAB * 4
"""Of f-k32-v64 in float32, as above."""


def test_nbytes_counts_the_states_before_the_last_update(model_of: Callable[[str, str], Qwen]) -> None:
    model = model_of("f-k32-v64", "float32")
    cache = after(model, 20)
    greedy(model, cache, 1)
    assert cache.nbytes == 2 * (F_STATES + F_WINDOWS) + F_SLABS
    cache.rewind(1)
    assert cache.nbytes == F_STATES + F_WINDOWS + F_SLABS


def test_nbytes_counts_the_tape(model_of: Callable[[str, str], Qwen]) -> None:
    """Of each token: columns, and in float32 keys, decays and deltas, Hk Dk + Hv + Hv Dv."""
    model = model_of("f-k32-v64", "float32")
    cache = after(model, 20)
    model(prompt(6), cache)
    tape = 3 * 6 * (2 * 2 * 32 + 4 * 64 + 2 * 32 + 4 + 4 * 64) * 4
    assert cache.nbytes == 2 * (F_STATES + F_WINDOWS) + F_SLABS + tape


def test_nbytes_counts_checkpoints_and_what_they_share_once(model_of: Callable[[str, str], Qwen]) -> None:
    """Keys and values are not theirs: they stay in the cache."""
    model = model_of("f-k32-v64", "float32")
    cache = after(model, 20)
    cache.checkpoint()
    assert cache.nbytes == F_STATES + F_WINDOWS + F_SLABS
    greedy(model, cache, 1)
    assert cache.nbytes == 2 * (F_STATES + F_WINDOWS) + F_SLABS
    greedy(model, cache, 1)
    assert cache.nbytes == 3 * (F_STATES + F_WINDOWS) + F_SLABS


def grown(model: Qwen, work: Callable[[SequenceCache], object]) -> tuple[int, int]:
    """Bytes that a cache has taken in memory after `work`, and those that it says it holds."""
    gc.collect()
    mx.synchronize()
    before, cache = mx.get_active_memory(), model.make_cache()
    work(cache)
    mx.eval(cache.arrays)
    mx.synchronize()
    return mx.get_active_memory() - before, cache.nbytes


def prefilled(model: Qwen, cache: SequenceCache, *lengths: int) -> None:
    for length in lengths:
        mx.eval(model.hidden(model.embed(prompt(length)), cache), cache.arrays)


@pytest.mark.parametrize(
    "work",
    [
        pytest.param(lambda model, cache: prefilled(model, cache, 500), id="a_long_chunk"),
        pytest.param(lambda model, cache: prefilled(model, cache, 500, 500), id="chunks"),
        pytest.param(lambda model, cache: prefilled(model, cache, 500, 16), id="tape"),
        pytest.param(lambda model, cache: (prefilled(model, cache, 40), greedy(model, cache, 3)), id="single_tokens"),
        pytest.param(
            lambda model, cache: (prefilled(model, cache, 40, 9), cache.rewind(4), greedy(model, cache, 2)),
            id="taken_back",
        ),
        pytest.param(
            lambda model, cache: (prefilled(model, cache, 40), cache.checkpoint(), prefilled(model, cache, 200)),
            id="checkpoint",
        ),
    ],
)
def test_nbytes_is_what_is_kept_alive(work: Callable[[Qwen, SequenceCache], object], model: Qwen) -> None:
    """Of a chunk of 500 tokens, three layers' projected columns alone would be 2.3 MB."""
    grown(model, lambda cache: work(model, cache))  # constants that stay from the first call on
    taken, said = grown(model, lambda cache: work(model, cache))
    assert said <= taken <= said + 3 * 16384  # MLX lets a view keep that much more


def test_a_cache_without_snapshots_writes_in_place(model: Qwen) -> None:
    cache = after(model, 20)
    layer = cache.layers[3]
    assert isinstance(layer, KVCache)
    assert layer.slab is not None
    _, _, heads, _, size = layer.slab.shape
    layer.slab = mx.zeros((2, 1, heads, 2**23 // (heads * size), size))
    mx.eval(cache.arrays)
    greedy(model, cache, 1)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    greedy(model, cache, 3)
    assert mx.get_peak_memory() - before < 2**25  # the slab has 2**26 bytes


@pytest.mark.parametrize(
    ("variant", "dtype", "why"),
    [
        pytest.param(
            "f-k32-v64",
            "float32",
            r"its layer 0 holds RecurrentCache of 4 states of 64 x 32 and 3 columns of 384 in float32, "
            r"that of this cache RecurrentCache of 4 states of 32 x 32 and 3 columns of 384",
            id="shapes",
        ),
        pytest.param("b-r2-d64", "float32", "it has 8 layers, this cache 4", id="number_of_layers"),
        pytest.param("a-r1-d32", "bfloat16", "its layer 0 holds .* in bfloat16, .* in float32", id="dtype"),
    ],
)
@pytest.mark.parametrize("tokens", [0, 9], ids=["into_an_empty_cache", "into_a_filled_one"])
def test_a_snapshot_of_another_model_is_refused(
    variant: str, dtype: str, why: str, tokens: int, model: Qwen, model_of: Callable[[str, str], Qwen]
) -> None:
    cache = after(model, tokens) if tokens else model.make_cache()
    was, other = contents(cache), model_of(variant, dtype)
    for snapshot in (other.make_cache().snapshot(), after(other, 5).snapshot()):
        with pytest.raises(ValueError, match=f"The snapshot is of another model: {why}"):
            cache.restore(snapshot)
        assert cache.offset == tokens
        assert same(contents(cache), was)


def test_kinds_of_layers_in_another_order_are_refused(model: Qwen) -> None:
    cache = model.make_cache()
    turned = SequenceCache(cache.layers[::-1])
    with pytest.raises(ValueError, match="its layer 0 holds KVCache, that of this cache RecurrentCache"):
        SequenceCache(cache.layers).restore(turned.snapshot())


def remembered(model: Qwen) -> dict[str, object]:
    """What the modules hold besides weights and one another, by identity and, where it can be read, by value."""
    return {
        f"{place}.{name}": (id(value), repr(value) if isinstance(value, (int, float, str, tuple, list)) else None)
        for place, module in model.named_modules()
        for name, value in [*vars(module).items(), *module.items()]
    }


def test_no_place_is_kept_on_a_module(model_of: Callable[[str, str], Qwen]) -> None:
    model = model_of("b-r2-d64", "float32")
    after(model, 3)
    before = remembered(model)
    greedy(model, after(model, 30), 3)
    assert remembered(model) == before


def test_sequences_at_different_places_take_turns(model: Qwen) -> None:
    """Each goes on as if it were alone: where a token stands is known from its cache."""
    alone = [greedy(model, after(model, length), 6)[0] for length in (3, 40, 200)]
    caches, tokens = [after(model, length) for length in (3, 40, 200)], [[5], [5], [5]]
    for _ in range(6):
        for cache, own in zip(caches, tokens):
            own.extend(greedy(model, cache, 1, first=own[-1])[0])
    assert [own[1:] for own in tokens] == alone
