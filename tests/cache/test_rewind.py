"""A cache taken back is one that never went further: the same bits through the tape, the same tokens and logits."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen_mlx.cache.kv import SLAB, KVCache
from qwen_mlx.cache.recurrent import RecurrentCache
from qwen_mlx.cache.sequence import CHECKPOINTS, SequenceCache
from qwen_mlx.decoding.rewind import rewind
from qwen_mlx.kernels.backend import gpu_generation
from qwen_mlx.kernels.causal_conv1d import causal_conv1d
from qwen_mlx.kernels.gated_delta import SCAN_TOKENS
from qwen_mlx.kernels.gated_delta_scan import gated_delta_scan
from qwen_mlx.model import gated_deltanet
from qwen_mlx.model.qwen import Qwen
from tests.cache.test_sequence import TOLERANCE, contents, every_variant, greedy, prompt, same
from tests.metal_emulator import recording
from tests.metal_emulator.device import emulated_metal

# Matmuls of Metal add in another order for another number of rows; on a CPU every row comes out alike in float32.
rows_come_out_alike = pytest.mark.skipif(gpu_generation() is not None, reason="bits of rows depend on their number")


@pytest.fixture(scope="module")
def model(model_of: Callable[[str, str], Qwen]) -> Qwen:
    return model_of("a-r1-d32", "float32")


def fed(model: Qwen, *pieces: mx.array, padding: list[int] | None = None) -> SequenceCache:
    """A cache that took in the pieces [B, T], each in one update."""
    cache = model.make_cache(padding)
    for piece in pieces:
        mx.eval(model(piece, cache), cache.arrays)
    return cache


def cut(tokens: mx.array, *lengths: int) -> list[mx.array]:
    return [piece for piece in mx.split(tokens, np.cumsum(lengths).tolist(), axis=1) if piece.size]


@pytest.mark.parametrize("n", [1, 4, 8])
@rows_come_out_alike
@every_variant
def test_a_part_of_an_update_taken_back(variant: str, n: int, model_of: Callable[[str, str], Qwen]) -> None:
    model = model_of(variant, "float32")
    first, update = cut(prompt(30 + 9), 30)
    cache = fed(model, first, update)
    cache.rewind(n)
    assert cache.offset == 39 - n
    assert same(contents(cache), contents(fed(model, first, update[:, : 9 - n])))


@pytest.mark.parametrize("T", [2, 3, 4, 5, SCAN_TOKENS])
@pytest.mark.parametrize("start", [0, 1, SLAB - 3])
@rows_come_out_alike
def test_every_part_of_an_update(model: Qwen, start: int, T: int) -> None:
    *before, update = cut(prompt(start + T), start)
    cache, fresh = fed(model, *before), fed(model, *before)
    snapshot = cache.snapshot()
    for n in range(1, T):
        cache.restore(snapshot)
        fresh.restore(snapshot)
        model(update, cache)
        cache.rewind(n)
        model(update[:, : T - n], fresh)
        assert same(contents(cache), contents(fresh))


@rows_come_out_alike
def test_in_bfloat16(model_of: Callable[[str, str], Qwen]) -> None:
    model = model_of("b-r2-d64", "bfloat16")
    first, update = cut(prompt(36), 30)
    cache = fed(model, first, update)
    cache.rewind(2)
    states = [layer.recurrent_state for layer in cache.layers if isinstance(layer, RecurrentCache)]
    assert all(state.dtype == mx.float32 for state in states)
    assert same(contents(cache), contents(fed(model, first, update[:, :4])))


def keys_and_values(cache: SequenceCache) -> list[np.ndarray]:
    return contents(SequenceCache([layer for layer in cache.layers if isinstance(layer, KVCache)]))


@dataclass
class Heard:
    """What the mixers of a model gave to the convolution and to the delta rule, in one update."""

    convolutions: list[tuple[Any, ...]]
    scans: list[tuple[mx.array, ...]]

    def states_after(self, n: int) -> list[mx.array]:
        """Of all layers, had they stopped after n tokens of this update."""
        states = []
        for (x, weight, window, options), scan in zip(self.convolutions, self.scans):
            options = {**options, "mask": None if options["mask"] is None else options["mask"][:, :n]}
            states.append(causal_conv1d(x[:, :n], weight, window, **options)[3])
            states.append(gated_delta_scan(*(a[:, :n] for a in scan[:5]), scan[5])[1])
        return states


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> Heard:
    heard = Heard([], [])

    def conv(x: mx.array, weight: mx.array, conv_state: mx.array, **options: Any) -> Any:
        heard.convolutions.append((x, weight, conv_state, options))
        return causal_conv1d(x, weight, conv_state, **options)

    def scan(*arguments: mx.array) -> Any:
        heard.scans.append(arguments)
        return gated_delta_scan(*arguments)

    monkeypatch.setattr(gated_deltanet, "causal_conv1d", conv)
    monkeypatch.setattr(gated_deltanet, "gated_delta_scan", scan)
    return heard


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("padding", [None, [0, 5, 33]], ids=["rows", "padded_rows"])
@pytest.mark.parametrize("start", [0, 30])
def test_states_are_those_of_layers_that_stopped(
    start: int, padding: list[int] | None, dtype: str, heard: Heard, model_of: Callable[[str, str], Qwen]
) -> None:
    """On any machine, and whatever its matmuls do: of the same projections the same bits."""
    model = model_of("c-r3-d128", dtype)
    *before, update = cut(prompt(start + 7, rows=3), start)
    for n in range(1, 7):
        cache = fed(model, *before, padding=padding)
        heard.convolutions.clear()
        heard.scans.clear()
        mx.eval(model(update, cache))
        expected, further = heard.states_after(7 - n), keys_and_values(cache)
        cache.rewind(n)
        states = [array for layer in cache.layers if isinstance(layer, RecurrentCache) for array in layer.arrays]
        assert all(mx.array_equal(x, y).item() for x, y in zip(states, expected, strict=True))
        assert same(keys_and_values(cache), [array[..., : start + 7 - n, :] for array in further])


@pytest.mark.parametrize("T", [1, 2, SCAN_TOKENS, SCAN_TOKENS + 1, 40])
@pytest.mark.parametrize("start", [0, 1, 30])
def test_a_whole_update_taken_back(model: Qwen, start: int, T: int) -> None:
    *before, update = cut(prompt(start + T), start)
    cache = fed(model, *before)
    was = contents(cache)
    mx.eval(model(update, cache))
    cache.rewind(T)
    assert cache.offset == start
    assert same(contents(cache), was) if start else not any(array.size for array in contents(cache))


def test_taken_back_piece_by_piece(model: Qwen) -> None:
    first, update = cut(prompt(39), 30)
    cache, was = fed(model, first, update), contents(fed(model, first))
    for n in (2, 0, 3, 4):
        cache.rewind(n)
    assert same(contents(cache), was)
    assert not cache.can_rewind(1)


@every_variant
def test_the_same_next_32_tokens_as_one_that_never_went_further(
    variant: str, model_of: Callable[[str, str], Qwen]
) -> None:
    model = model_of(variant, "float32")
    first, update = cut(prompt(39), 30)
    cache = fed(model, first, update)
    cache.rewind(5)
    tokens, logits = greedy(model, cache, 32)
    expected_tokens, expected_logits = greedy(model, fed(model, first, update[:, :4]), 32)
    assert tokens == expected_tokens
    assert np.abs(logits - expected_logits).max() < TOLERANCE


@pytest.mark.parametrize("kept", [0, 4, 30, 45])
def test_the_same_next_32_tokens_after_computing_anew(model: Qwen, kept: int) -> None:
    tokens = prompt(60)
    cache = fed(model, *cut(tokens, 25, 25))
    rewind(model, cache, tokens[0].tolist(), 60 - kept, step_size=16)
    ours, logits = greedy(model, cache, 32)
    expected_tokens, expected_logits = greedy(model, fed(model, *cut(tokens[:, :kept])), 32)
    assert cache.offset == kept + 32
    assert ours == expected_tokens
    assert np.abs(logits - expected_logits).max() < TOLERANCE


def test_another_way_after_going_back(model: Qwen) -> None:
    """Nothing of what was taken back is seen again."""
    first, update = cut(prompt(39), 30)
    cache = fed(model, first, update)
    cache.rewind(5)
    other = (update[:, 4:] + 1) % 352
    logits = model(other, cache)
    expected = model(mx.concatenate([first, update[:, :4], other], axis=1))[:, -5:]
    assert mx.abs(logits - expected).max() < TOLERANCE


def test_a_snapshot_is_not_written_over_by_another_way(model: Qwen) -> None:
    cache = fed(model, *cut(prompt(39), 30))
    was, snapshot = contents(cache), cache.snapshot()
    cache.rewind(5)
    greedy(model, cache, 6, first=99)
    cache.restore(snapshot)
    assert same(contents(cache), was)


@pytest.mark.parametrize(
    ("pieces", "n", "why"),
    [
        pytest.param((30, 5), -1, "Cannot take back -1 tokens: the number must be 0 or more", id="negative"),
        pytest.param((30, 5), 36, "Cannot take back 36 tokens: the cache holds 35", id="beyond_the_start"),
        pytest.param((), 1, "Cannot take back 1 tokens: the cache holds 0", id="of_an_empty_cache"),
        pytest.param(
            (30, 5), 6, "the last update had 5, of which any can be taken back. Restore", id="more_than_taped"
        ),
        pytest.param((30, 17), 3, "the last update had 17, of which all can be taken back. Restore", id="too_long"),
        pytest.param((30, 1), 2, "the last update had 1, of which all can be taken back. Restore", id="a_single_token"),
    ],
)
def test_what_cannot_be_taken_back_is_refused(model: Qwen, pieces: tuple[int, ...], n: int, why: str) -> None:
    cache = fed(model, *cut(prompt(sum(pieces)), *pieces))
    was = contents(cache)
    with pytest.raises(ValueError, match=why):
        cache.rewind(n)
    assert same(contents(cache), was)
    assert cache.offset == sum(pieces)


@pytest.mark.parametrize("forget", ["restore", "whole_update"])
def test_without_an_update_in_mind_nothing_can_be_taken_back(model: Qwen, forget: str) -> None:
    cache = fed(model, *cut(prompt(39), 30))
    if forget == "restore":
        cache.restore(cache.snapshot())
    else:
        cache.rewind(9)
    assert cache.can_rewind(0)
    with pytest.raises(ValueError, match="no update is known that could be taken back"):
        cache.rewind(1)


def test_the_newest_checkpoints_are_kept(model: Qwen) -> None:
    cache = model.make_cache()
    for piece in cut(prompt(60), *[10] * 6):
        model(piece, cache)
        cache.checkpoint()
        cache.checkpoint()  # at the same place it counts once
    cache.back_to_checkpoint(59)
    assert cache.offset == 50
    oldest = 10 * (6 - CHECKPOINTS + 1)
    cache.back_to_checkpoint(oldest + 9)
    assert cache.offset == oldest
    cache.back_to_checkpoint(oldest - 1)
    assert cache.offset == 0


def test_checkpoints_ahead_are_forgotten(model: Qwen) -> None:
    tokens = prompt(40)
    cache = fed(model, tokens[:, :10])
    cache.checkpoint()
    mx.eval(model(tokens[:, 10:15], cache))
    cache.checkpoint()
    cache.rewind(2)
    greedy(model, cache, 5)
    for _ in range(2):  # the one gone back to stays
        cache.back_to_checkpoint(16)
        assert cache.offset == 10
        assert same(contents(cache), contents(fed(model, tokens[:, :10])))
        greedy(model, cache, 3)


def test_a_snapshot_brings_its_own_checkpoints(model: Qwen) -> None:
    one, other = prompt(40), (prompt(40) + 1) % 352
    cache = fed(model, one[:, :10])
    cache.checkpoint()
    greedy(model, cache, 10)
    snapshot = cache.snapshot()
    cache.restore(fed(model, other[:, :30]).snapshot())
    cache.back_to_checkpoint(20)
    assert cache.offset == 0
    cache.restore(snapshot)
    cache.back_to_checkpoint(19)
    assert same(contents(cache), contents(fed(model, one[:, :10])))


FEED = st.one_of(st.just(1), st.integers(2, SCAN_TOKENS), st.integers(SCAN_TOKENS + 1, 40))
STEPS = st.one_of(
    st.tuples(st.just("feed"), FEED),
    st.tuples(st.just("rewind"), st.integers(0, SCAN_TOKENS)),
    st.tuples(st.just("rewind"), st.integers(0, 200)),
    st.tuples(st.just("restore"), st.integers(0, 9)),
    st.sampled_from([("snapshot", 0), ("checkpoint", 0)]),
)


class Walk:
    """A cache on its way, and beside it the pieces that a fresh one would be fed; None once it was computed anew."""

    def __init__(self, model: Qwen, padding: list[int] | None) -> None:
        self.model, self.padding = model, padding
        self.rows = len(padding) if padding else 1
        self.random = np.random.RandomState(7)
        self.cache = model.make_cache(padding)
        self.tokens = np.zeros((self.rows, 0), np.int64)
        self.pieces: list[int] | None = []
        self.snapshots = [(self.cache.snapshot(), self.tokens, self.pieces)]

    def feed(self, count: int) -> None:
        new = self.random.randint(0, 352, (self.rows, count))
        self.tokens = np.concatenate([self.tokens, new], axis=1)
        if count == 1:
            self.model.step(mx.array(new), self.cache)
        else:
            self.model(mx.array(new), self.cache)
        if self.pieces is not None:
            self.pieces = [*self.pieces, count]

    def rewind(self, n: int) -> None:
        n = min(n, self.tokens.shape[1])
        possible = self.cache.can_rewind(n)
        if self.padding and not possible:
            with pytest.raises(ValueError, match="Cannot take back"):
                rewind(self.model, self.cache, self.tokens[0].tolist(), n, step_size=50)
            return
        rewind(self.model, self.cache, self.tokens[0].tolist(), n, step_size=50)
        self.tokens = self.tokens[:, : self.tokens.shape[1] - n]
        if not possible:
            self.pieces = None
        elif n and self.pieces is not None:
            self.pieces = [*self.pieces[:-1], *([self.pieces[-1] - n] if self.pieces[-1] > n else [])]

    def snapshot(self, _: int) -> None:
        self.snapshots.append((self.cache.snapshot(), self.tokens, self.pieces))

    def restore(self, index: int) -> None:
        snapshot, self.tokens, self.pieces = self.snapshots[index % len(self.snapshots)]
        self.cache.restore(snapshot)

    def checkpoint(self, _: int) -> None:
        self.cache.checkpoint()

    def check(self) -> None:
        assert self.cache.offset == self.tokens.shape[1]
        held = mx.array(self.tokens)
        if self.pieces is not None and gpu_generation() is None:
            fresh = fed(self.model, *cut(held, *self.pieces[:-1]), padding=self.padding)
            assert same([a for a in contents(self.cache) if a.size], contents(fresh))
        probe = mx.full((self.rows, 1), 3)
        logits, _ = self.model.step(probe, self.cache)
        expected = self.model(mx.concatenate([held, probe], axis=1), self.model.make_cache(self.padding))[:, -1]
        assert mx.abs(logits - expected).max() < TOLERANCE


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    steps=st.lists(STEPS, min_size=1, max_size=12),
    padding=st.sampled_from([None, None, [0, 9]]),
    variant=st.sampled_from(["a-r1-d32", "d-moe", "f-k32-v64"]),
)
def test_any_walk_ends_where_a_fresh_cache_does(
    steps: list[tuple[str, int]], padding: list[int] | None, variant: str, model_of: Callable[[str, str], Qwen]
) -> None:
    walk = Walk(model_of(variant, "float32"), padding)
    for verb, number in steps:
        getattr(walk, verb)(number)
    walk.check()


@pytest.mark.parametrize("variant", ["a-r1-d32", "e-k64-v32", "f-k32-v64"])
@pytest.mark.parametrize("padding", [None, [0, 9]], ids=["one_row", "padded_rows"])
@rows_come_out_alike
def test_on_metal_a_part_of_an_update(
    variant: str, padding: list[int] | None, model_of: Callable[[str, str], Qwen]
) -> None:
    model = model_of(variant, "float32")
    first, update = cut(prompt(26, rows=2 if padding else 1), 20)
    with emulated_metal(fma=True):
        cache = fed(model, first, update, padding=padding)
        with recording() as runs:
            cache.rewind(2)
            mx.eval(cache.arrays)
        assert {run.name for run in runs} == {"qwen_gated_delta_replay"}
        assert same(contents(cache), contents(fed(model, first, update[:, :4], padding=padding)))


@pytest.mark.parametrize("kept", [1, 5])
def test_on_metal_the_next_tokens_go_through_the_step_kernel(model: Qwen, kept: int) -> None:
    """One kept token went through the scan, and would have gone through the step kernel: here the logits are alike."""
    first, update = cut(prompt(26), 20)
    with emulated_metal():
        cache = fed(model, first, update)
        cache.rewind(6 - kept)
        tokens, logits = greedy(model, cache, 4)
        fresh = fed(model, first, *cut(update[:, :kept], *[1] * (kept - 1)))
        expected_tokens, expected_logits = greedy(model, fresh, 4)
    assert tokens == expected_tokens
    assert np.abs(logits - expected_logits).max() < TOLERANCE


@pytest.mark.parametrize(
    "steps",
    [
        [("feed", 20), ("feed", 6), ("rewind", 2), ("feed", 1), ("rewind", 1), ("feed", 3), ("rewind", 3)],
        [("feed", 5), ("snapshot", 0), ("feed", 1), ("feed", 4), ("rewind", 1), ("restore", 1), ("feed", 2)],
        [("feed", 18), ("checkpoint", 0), ("feed", 1), ("feed", 1), ("rewind", 2), ("feed", 4), ("rewind", 4)],
    ],
    ids=["tape", "snapshot", "checkpoint"],
)
def test_on_metal_a_walk(model: Qwen, steps: list[tuple[str, int]]) -> None:
    walk = Walk(model, None)
    with emulated_metal():
        for verb, number in steps:
            getattr(walk, verb)(number)
        walk.check()


def test_layers_that_never_forget_can_always_be_taken_back() -> None:
    keys_values = mx.random.normal((2, 1, 2, 5, 8))
    cache = SequenceCache([KVCache()])
    for _ in range(3):
        cache.layers[0].update(keys_values)
    cache.rewind(11)
    assert cache.offset == 4
