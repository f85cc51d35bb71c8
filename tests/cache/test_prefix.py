"""The prefix store: what it gives back is a fresh prefill, what it holds is what it says, what goes is what waited."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import astuple
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen_mlx.cache.kv import SLAB, KVCache
from qwen_mlx.cache.prefix import PrefixStore
from qwen_mlx.cache.quantized_kv import QuantizedKVCache
from qwen_mlx.cache.sequence import SequenceCache
from qwen_mlx.decoding.prefill import prefill
from qwen_mlx.model.qwen import Qwen
from tests.cache.test_sequence import TOLERANCE, contents, greedy, prompt, same

STATES = 3 * (4 * 32 * 32 + 3 * (2 * 4 * 32 + 4 * 32)) * 4
KEYS_VALUES = 2 * 2 * 64 * 4
"""Bytes of a place and of a token of a-r1-d32 in float32: three linear layers with Hk 4, Hv 4, Dk 32, Dv 32 and one
attention layer with Hkv 2, Dh 64."""


def ids(count: int) -> list[int]:
    return np.array(prompt(count))[0].tolist()


TEXT = ids(60)
OTHER = [(token + 1) % 352 for token in TEXT]
"""Another token than TEXT has at every place."""


@pytest.fixture(scope="module")
def model(model_of: Callable[[str, str], Qwen]) -> Qwen:
    return model_of("a-r1-d32", "float32")


@pytest.fixture
def store(model: Qwen) -> PrefixStore:
    return PrefixStore(model)


def read(model: Qwen, tokens: Sequence[int], *marks: int, kv_bits: int | None = None) -> SequenceCache:
    """A cache that took `tokens` in, with checkpoints at `marks`."""
    cache = model.make_cache(kv_bits=kv_bits)
    mx.eval(prefill(model, tokens, cache, step_size=512, marks=marks))
    return cache


def keep(store: PrefixStore, model: Qwen, tokens: Sequence[int], *marks: int) -> None:
    store.add(tokens, read(model, tokens, *marks))


def cached(store: PrefixStore, model: Qwen, tokens: Sequence[int]) -> int:
    return store.restore(tokens, model.make_cache()).cached


def goes_on_as_a_fresh_one(model: Qwen, cache: SequenceCache, tokens: Sequence[int]) -> None:
    """`cache` is one that has read `tokens`, and nothing else."""
    assert cache.offset == len(tokens)
    if tokens:
        fresh = read(model, tokens)
        assert max(np.abs(a - b).max() for a, b in zip(contents(cache), contents(fresh), strict=True)) < 1e-4
        (ours, logits), (expected, expected_logits) = greedy(model, cache, 8), greedy(model, fresh, 8)
        assert ours == expected
        assert np.abs(logits - expected_logits).max() < TOLERANCE


@pytest.mark.parametrize(
    ("asked", "match"),
    [
        pytest.param([*TEXT, 3, 4], (60, 60, None), id="goes_on"),
        pytest.param(TEXT, (40, 60, None), id="the_same_again"),
        pytest.param([*TEXT[:50], *OTHER[50:]], (40, 50, TEXT[50]), id="parts_inside_a_piece"),
        pytest.param([*TEXT[:40], *OTHER[40:]], (40, 40, TEXT[40]), id="parts_between_pieces"),
        pytest.param(TEXT[:41], (40, 41, TEXT[41]), id="ends_behind_a_piece"),
        pytest.param(TEXT[:40], (20, 40, TEXT[40]), id="ends_with_a_piece"),
        pytest.param(TEXT[:10], (0, 10, TEXT[10]), id="ends_before_the_first_place"),
        pytest.param([*TEXT[:10], *OTHER], (0, 10, TEXT[10]), id="parts_before_the_first_place"),
        pytest.param(OTHER, (0, 0, TEXT[0]), id="another_text"),
        pytest.param(TEXT[:1], (0, 1, TEXT[1]), id="one_token"),
    ],
)
def test_the_longest_common_beginning(
    asked: list[int], match: tuple[int, int, int | None], store: PrefixStore, model: Qwen
) -> None:
    """Of a text kept at 20, 40 and 60 tokens; a token is always left, whose logits are wanted."""
    keep(store, model, TEXT, 20, 40, 60)
    cache = model.make_cache()
    assert astuple(store.restore(asked, cache)) == match
    goes_on_as_a_fresh_one(model, cache, asked[: match[0]])


def test_of_an_empty_store(store: PrefixStore, model: Qwen) -> None:
    assert astuple(store.restore(TEXT, model.make_cache())) == (0, 0, None)
    assert store.nbytes == 0


@pytest.mark.parametrize("kv_bits", [None, 8, 4])
def test_quantized_keys_and_values_come_back_as_they_were(store: PrefixStore, model: Qwen, kv_bits: int | None) -> None:
    """Not quantized a second time."""
    was, cache = read(model, TEXT, 60, kv_bits=kv_bits), model.make_cache(kv_bits=kv_bits)
    store.add(TEXT, was)
    store.restore([*TEXT, 1], cache)
    assert same(contents(cache), contents(was))
    assert greedy(model, cache, 8)[0] == greedy(model, was, 8)[0]


def test_there_is_room_for_the_prompt(store: PrefixStore, model: Qwen) -> None:
    """The rest of it is written in place, not into a slab that is copied to grow."""
    keep(store, model, TEXT, 60)
    cache = model.make_cache()
    store.restore([*TEXT, *ids(2 * SLAB)], cache)
    assert cache.arrays[-1].shape[3] == 3 * SLAB


def test_texts_that_begin_alike_share_what_they_have_in_common(store: PrefixStore, model: Qwen) -> None:
    keep(store, model, TEXT, 20, 60)
    assert store.nbytes == 2 * STATES + 60 * KEYS_VALUES
    keep(store, model, [*TEXT[:20], *OTHER[:30]], 20, 50)
    assert store.nbytes == 3 * STATES + (60 + 30) * KEYS_VALUES


def test_texts_that_part_inside_a_piece_share_what_is_before_it(store: PrefixStore, model: Qwen) -> None:
    keep(store, model, TEXT, 20, 60)
    keep(store, model, [*TEXT[:35], *OTHER[:15]], 20, 50)
    assert store.nbytes == 3 * STATES + (60 + 30) * KEYS_VALUES
    assert cached(store, model, [*TEXT[:35], *OTHER]) == 50
    assert cached(store, model, [*TEXT, 1]) == 60


def test_a_place_inside_a_piece_is_a_way_of_its_own(store: PrefixStore, model: Qwen) -> None:
    keep(store, model, TEXT, 60)
    keep(store, model, TEXT[:30], 30)
    assert [cached(store, model, TEXT[:end]) for end in (30, 31, 60)] == [0, 30, 30]
    assert cached(store, model, [*TEXT, 1]) == 60


def test_what_is_kept_already_is_not_kept_twice(store: PrefixStore, model: Qwen) -> None:
    for _ in range(2):
        keep(store, model, TEXT, 20, 40, 60)
    assert store.nbytes == 3 * STATES + 60 * KEYS_VALUES


def settled() -> int:
    gc.collect()
    mx.synchronize()
    return mx.get_active_memory()


@pytest.mark.parametrize("kv_bits", [None, 8])
@pytest.mark.parametrize("marks", [(300,), (100, 200, 299), (7, 100, 300)], ids=str)
def test_nbytes_is_what_memory_it_takes(
    marks: tuple[int, ...], kv_bits: int | None, model_of: Callable[[str, str], Qwen]
) -> None:
    """Pieces and states are copies: of the caches, their slabs and their chunks nothing stays alive with them."""
    model, tokens = model_of("c-r3-d128", "float32"), ids(300)
    read(model, tokens, *marks, kv_bits=kv_bits)  # constants that stay from the first call on
    before, store = settled(), PrefixStore(model)
    for other in (tokens, [*tokens[:150], *ids(150)]):
        store.add(other, read(model, other, *marks, kv_bits=kv_bits))
    assert store.nbytes == pytest.approx(settled() - before, rel=0.02)


def test_memory_goes_with_the_store_and_waits_for_no_collector(model: Qwen) -> None:
    read(model, TEXT, 20, 40, 60)  # constants that stay from the first call on
    before, store = settled(), PrefixStore(model)
    keep(store, model, TEXT, 20, 40, 60)
    assert settled() - before >= store.nbytes > 0
    gc.disable()
    try:
        del store
        assert mx.get_active_memory() == before
    finally:
        gc.enable()


def test_a_cache_that_goes_on_changes_nothing_kept(store: PrefixStore, model: Qwen) -> None:
    cache = read(model, TEXT, 40, 60)
    store.add(TEXT, cache)
    greedy(model, cache, 3)
    cache.rewind(1)
    model(mx.array([OTHER]), cache)
    again = model.make_cache()
    store.restore([*TEXT, 1], again)
    goes_on_as_a_fresh_one(model, again, TEXT)
    store.restore([*TEXT, 1], again := model.make_cache())
    goes_on_as_a_fresh_one(model, again, TEXT)


ONE = STATES + 60 * KEYS_VALUES
TEXTS = [[(token + shift) % 352 for token in TEXT] for shift in range(4)]
"""Of which no two have a beginning in common."""


def known(store: PrefixStore, model: Qwen) -> list[int]:
    """Which of TEXTS are kept; asking counts as a use."""
    return [i for i, text in enumerate(TEXTS) if cached(store, model, [*text, 1])]


def test_the_least_recently_used_goes(model: Qwen) -> None:
    store = PrefixStore(model, max_bytes=3 * ONE)
    for text in TEXTS[:3]:
        keep(store, model, text, 60)
    assert cached(store, model, [*TEXTS[0], 1]) == 60  # a use
    keep(store, model, TEXTS[1], 60)  # and so is this
    keep(store, model, TEXTS[3], 60)
    assert store.nbytes == 3 * ONE
    assert known(store, model) == [0, 1, 3]


@pytest.mark.parametrize(("room", "left"), [(3 * ONE - 1, [2, 3]), (ONE, [3]), (ONE - 1, []), (0, [])])
def test_never_more_than_max_bytes(model: Qwen, room: int, left: list[int]) -> None:
    store = PrefixStore(model, max_bytes=room)
    for text in TEXTS:
        keep(store, model, text, 60)
        assert store.nbytes <= room
    assert known(store, model) == left


def test_not_for_a_moment_more_than_max_bytes_and_one_place(model_of: Callable[[str, str], Qwen]) -> None:
    """However many places a chunk has."""
    model, tokens, marks = model_of("c-r3-d128", "float32"), ids(60), range(5, 60, 5)
    cache = read(model, tokens, *marks)
    one = sum(a.nbytes for pair in cache.checkpoints[0].states for a in pair if a is not None)
    store = PrefixStore(model, max_bytes=3 * one)
    before = settled()
    mx.reset_peak_memory()
    store.add(tokens, cache)
    assert mx.get_peak_memory() - before < 4.5 * one


def test_of_a_text_too_long_the_beginning_is_kept(model: Qwen) -> None:
    store = PrefixStore(model, max_bytes=3 * ONE)
    long = ids(2 * SLAB)
    keep(store, model, long, 40, len(long))
    assert cached(store, model, [*long, 1]) == 40


@pytest.mark.parametrize(
    ("length", "room"),
    [
        pytest.param(2 * SLAB, 3 * ONE, id="too_many_tokens"),
        pytest.param(90, STATES + 90 * KEYS_VALUES - 1, id="no_room_for_states"),
    ],
)
def test_what_does_not_fit_by_itself_drives_nothing_away(model: Qwen, length: int, room: int) -> None:
    store = PrefixStore(model, max_bytes=room)
    keep(store, model, TEXT, 60)
    keep(store, model, [(token + 1) % 352 for token in ids(length)], length)
    assert store.nbytes == ONE
    assert cached(store, model, [*TEXT, 1]) == 60


def test_drop_gives_up_one_place_after_the_other(store: PrefixStore, model: Qwen) -> None:
    keep(store, model, TEXTS[0], 60)
    keep(store, model, TEXTS[1], 60)
    sizes = [store.nbytes]
    while store.drop():
        sizes.append(store.nbytes)
    assert sizes == [2 * ONE, ONE, 0]
    assert not store.drop()


def test_keys_and_values_stay_as_long_as_a_later_place_needs_them(store: PrefixStore, model: Qwen) -> None:
    keep(store, model, TEXT, 20, 40, 60)
    store.drop()
    store.drop()
    assert store.nbytes == STATES + 60 * KEYS_VALUES
    assert cached(store, model, TEXT) == 0
    cache = model.make_cache()
    assert store.restore([*TEXT, 1], cache).cached == 60
    goes_on_as_a_fresh_one(model, cache, TEXT)
    store.drop()
    assert store.nbytes == 0


def test_a_use_is_one_of_all_places_on_the_way(store: PrefixStore, model: Qwen) -> None:
    """The last of them goes first: texts that are still to come begin alike."""
    keep(store, model, TEXT, 20, 60)
    keep(store, model, [*TEXT[:40], *OTHER[40:]], 40)  # a way of its own
    keep(store, model, OTHER, 60)
    cached(store, model, [*TEXT, 1])
    sizes = []
    while store.drop():
        sizes.append(store.nbytes)
    assert sizes == [3 * STATES + 80 * KEYS_VALUES, 2 * STATES + 40 * KEYS_VALUES, STATES + 20 * KEYS_VALUES, 0]


def test_a_place_given_up_is_kept_anew_where_it_was(store: PrefixStore, model: Qwen) -> None:
    keep(store, model, TEXT, 20, 60)
    store.drop()
    keep(store, model, TEXT[:25], 20)
    assert store.nbytes == 2 * STATES + 60 * KEYS_VALUES
    assert cached(store, model, TEXT[:25]) == 20


def test_the_beginning_of_every_text_is_no_place(store: PrefixStore, model: Qwen) -> None:
    cache = model.make_cache()
    cache.checkpoint()
    store.add([], cache)
    assert store.nbytes == 0
    assert cached(store, model, TEXT) == 0


def padded(model: Qwen, padding: list[int]) -> SequenceCache:
    cache = model.make_cache(padding)
    mx.eval(model(prompt(60, rows=len(padding)), cache))
    cache.checkpoint()
    return cache


def rows(model: Qwen) -> SequenceCache:
    cache = model.make_cache()
    mx.eval(model(prompt(60, rows=2), cache))
    cache.checkpoint()
    return cache


@pytest.mark.parametrize(
    ("what", "tokens", "why"),
    [
        pytest.param(lambda model: read(model, TEXT, 60), TEXT[:59], "holds 60 tokens, but 59 are given", id="fewer"),
        pytest.param(lambda model: read(model, TEXT, 60), [*TEXT, 1], "holds 60 tokens, but 61 are given", id="more"),
        pytest.param(rows, TEXT, "give each row of a batch its own cache", id="rows"),
        pytest.param(lambda model: padded(model, [0, 3]), TEXT, "give each row of a batch its own", id="padded_rows"),
        pytest.param(lambda model: padded(model, [3]), TEXT, "give each row of a batch its own", id="padded"),
        pytest.param(
            lambda model: read(model, TEXT, 60, kv_bits=8),
            TEXT,
            "layer 3 holds KVCache .*, that of .* 8 bits",
            id="bits",
        ),
    ],
)
def test_what_cannot_be_kept_is_refused(
    what: Callable[[Qwen], SequenceCache], tokens: list[int], why: str, store: PrefixStore, model: Qwen
) -> None:
    keep(store, model, TEXT, 40)
    cache = what(model)
    held, was = store.nbytes, contents(cache)
    with pytest.raises(ValueError, match=why):
        store.add(tokens, cache)
    assert store.nbytes == held
    assert same(contents(cache), was)
    assert (cached(store, model, TEXT), cached(store, model, [*TEXT, 1])) == (40, 40)


@pytest.mark.parametrize(
    ("what", "why"),
    [
        pytest.param(lambda model: read(model, TEXT[:5]), "goes into an empty cache without padding", id="not_empty"),
        pytest.param(lambda model: model.make_cache([0]), "goes into an empty cache without padding", id="padded"),
        pytest.param(
            lambda model: model.make_cache(kv_bits=8), "of another model: its layer 3 holds KVCache", id="bits"
        ),
    ],
)
def test_what_cannot_be_filled_is_refused(
    what: Callable[[Qwen], SequenceCache], why: str, store: PrefixStore, model: Qwen
) -> None:
    keep(store, model, TEXT, 40)
    cache = what(model)
    was = contents(cache)
    with pytest.raises(ValueError, match=why):
        store.restore(TEXT, cache)
    assert same(contents(cache), was)


@pytest.mark.parametrize("what", ["add", "restore"])
def test_a_cache_of_another_model_is_refused(
    what: str, store: PrefixStore, model: Qwen, model_of: Callable[[str, str], Qwen]
) -> None:
    keep(store, model, TEXT, 40)
    other = model_of("f-k32-v64", "float32")
    with pytest.raises(ValueError, match="The prefix store is of another model: its layer 0 holds RecurrentCache of 4"):
        store.add(TEXT, read(other, TEXT, 60)) if what == "add" else store.restore(TEXT, other.make_cache())
    assert store.nbytes == STATES + 40 * KEYS_VALUES


def test_a_negative_size_is_refused(model: Qwen) -> None:
    with pytest.raises(ValueError, match="max_bytes must be 0 or more, not -1"):
        PrefixStore(model, max_bytes=-1)


def test_a_store_does_not_keep_its_model() -> None:
    class Model:
        pass

    model = Model()
    store = PrefixStore(model)
    assert store.model is model
    del model
    assert store.model is None


class Naive:
    """What a store holds, as a dictionary in the order of use: the beginnings at which one can go on."""

    def __init__(self) -> None:
        self.kept: dict[tuple[int, ...], None] = {}

    def use(self, beginning: tuple[int, ...]) -> None:
        self.kept.pop(beginning, None)
        self.kept[beginning] = None

    def use_way_to(self, place: tuple[int, ...]) -> None:
        """The shortest last."""
        way = [own for own in self.kept if place[: len(own)] == own]
        for own in sorted(way, key=len, reverse=True):
            self.use(own)

    def drop(self) -> bool:
        if self.kept:
            del self.kept[next(iter(self.kept))]
            return True
        return False

    def longest(self, tokens: tuple[int, ...]) -> tuple[int, ...]:
        places = [own for own in self.kept if len(own) < len(tokens) and tokens[: len(own)] == own]
        return max(places, key=len, default=())

    def match(self, tokens: tuple[int, ...]) -> tuple[int, int, set[int | None]]:
        """Tokens that need not be computed, tokens in common, and what may stand behind those."""
        common = max((_alike(own, tokens) for own in self.kept), default=0)
        behind = {own[common] for own in self.kept if _alike(own, tokens) == common < len(own)}
        return len(self.longest(tokens)), common, behind or {None}

    @property
    def least(self) -> int:
        """Bytes, were every token kept once."""
        return len(self.kept) * STATES + KEYS_VALUES * len(
            {own[:n] for own in self.kept for n in range(1, len(own) + 1)}
        )

    @property
    def most(self) -> int:
        """Bytes, were nothing shared."""
        return sum(STATES + KEYS_VALUES * len(own) for own in self.kept)


def _alike(one: Sequence[int], other: Sequence[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


class Walk:
    """A store, the dictionary beside it, and all texts so far."""

    def __init__(self, model: Qwen) -> None:
        self.model, self.store, self.naive = model, PrefixStore(model), Naive()
        self.texts: list[tuple[int, ...]] = [()]
        self.random = np.random.RandomState(11)

    def text(self, of: int, cut: float, more: int) -> tuple[int, ...]:
        """A beginning of an earlier text, and `more` tokens that are new."""
        earlier = self.texts[of % len(self.texts)]
        return (*earlier[: round(cut * len(earlier))], *self.random.randint(0, 352, more).tolist())

    def restored(self, tokens: tuple[int, ...]) -> SequenceCache:
        cache, expected = self.model.make_cache(), self.naive.longest(tokens)
        cached, common, behind = self.naive.match(tokens)
        match = self.store.restore(tokens, cache)
        assert (match.cached, match.common) == (cached, common)
        assert match.kept in behind
        self.naive.use_way_to(expected)
        return cache

    def add(self, of: int, cut: float, more: int, marks: list[float]) -> None:
        """As a prompt goes: what is known is restored, the rest is read, some places of it are kept."""
        tokens = self.text(of, cut, more)
        cache = self.restored(tokens)
        start = cache.offset
        places = sorted({start + 1 + int(mark * (len(tokens) - start - 1)) for mark in marks} - {len(tokens)})
        mx.eval(prefill(self.model, tokens[start:], cache, step_size=64, marks=places))
        self.store.add(tokens, cache)
        for place in places:
            self.naive.use(tokens[:place])
        self.texts.append(tokens)

    def restore(self, of: int, cut: float, more: int, _: list[float]) -> None:
        tokens = self.text(of, cut, more)
        cache = self.restored(tokens)
        goes_on_as_a_fresh_one(self.model, cache, tokens[: cache.offset])

    def drop(self, *_: object) -> None:
        assert self.store.drop() == self.naive.drop()

    def check(self) -> None:
        assert self.naive.least <= self.store.nbytes <= self.naive.most


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["add", "add", "add", "restore", "restore", "drop"]),
            st.integers(0, 9),
            st.sampled_from([0.0, 0.5, 0.8, 1.0, 1.0]),
            st.integers(1, 24),
            st.lists(st.floats(0, 1), max_size=4),
        ),
        min_size=2,
        max_size=14,
    )
)
def test_it_holds_what_a_dictionary_would(steps: list[tuple], model_of: Callable[[str, str], Qwen]) -> None:
    walk = Walk(model_of("a-r1-d32", "float32"))
    for what, *arguments in steps:
        getattr(walk, what)(*arguments)
        walk.check()
    while walk.naive.kept:
        walk.drop()
    assert walk.store.nbytes == 0


@pytest.mark.parametrize("make", [KVCache, lambda: QuantizedKVCache(8, 64), lambda: QuantizedKVCache(4, 64)])
@pytest.mark.parametrize("edges", [(0, 5), (0, SLAB), (0, 1, 2, SLAB + 3), (0, 100, 700)], ids=str)
@pytest.mark.parametrize("more", [0, 1, SLAB + 9])
def test_pieces_put_together_are_the_whole(make: Callable[[], KVCache], edges: tuple[int, ...], more: int) -> None:
    """In a slab with room for `more`, which goes on in place."""
    length, cache, other = edges[-1], make(), make()
    tokens = mx.random.normal((2, 1, 3, length + more + 1, 64), key=mx.random.key(1))
    cache.update(tokens[:, :, :, :length])
    pieces = [cache.piece(*edge) for edge in pairwise(edges)]
    mx.eval(pieces)
    cache.offset = 0
    cache.update(mx.zeros_like(tokens[:, :, :, :length]))  # written over
    mx.eval(cache.arrays)
    other.fill(pieces, length + more)
    room = other.arrays[0].shape[3]
    assert (other.offset, room % SLAB) == (length, 0)
    assert length + more <= room < length + more + SLAB
    whole = make()
    whole.update(tokens)
    if more:
        other.update(tokens[:, :, :, length : length + more])
    assert other.arrays[0].shape[3] == room
    ours, expected = (piece.piece(0, length + more) for piece in (other, whole))
    assert all(mx.array_equal(a, b).item() for a, b in zip(ours, expected, strict=True))
