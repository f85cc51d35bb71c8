"""Any number of tokens back, and what is computed anew for it."""

from collections.abc import Callable
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest

from qwen_mlx.cache.sequence import SequenceCache
from qwen_mlx.decoding import rewind as module
from qwen_mlx.decoding.prefill import prefill
from qwen_mlx.decoding.rewind import rewind
from qwen_mlx.model.qwen import Qwen
from tests.cache.test_sequence import TOLERANCE, contents, same

TOKENS = np.random.RandomState(3).randint(0, 352, 120).tolist()


@pytest.fixture(scope="module")
def model(model_of: Callable[[str, str], Qwen]) -> Qwen:
    return model_of("a-r1-d32", "float32")


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The tokens of each prefill that a rewind makes."""
    prefills = []

    def counted(model: Qwen, tokens: list[int], cache: SequenceCache, *, step_size: int) -> mx.array:
        prefills.append(list(tokens))
        return prefill(model, tokens, cache, step_size=step_size)

    monkeypatch.setattr(module, "prefill", counted)
    return prefills


def cache_with(model: Qwen, *, checkpoints: tuple[int, ...] = (), last: int = 20) -> SequenceCache:
    """All TOKENS, the last of them in one update."""
    cache, edges = model.make_cache(), sorted({0, *checkpoints, len(TOKENS) - last, len(TOKENS)})
    for start, stop in pairwise(edges):
        prefill(model, TOKENS[start:stop], cache, step_size=200)
        if stop in checkpoints:
            cache.checkpoint()
    return cache


@pytest.mark.parametrize(
    ("checkpoints", "last", "n", "anew"),
    [
        pytest.param((), 9, 0, None, id="nothing_back"),
        pytest.param((), 9, 4, None, id="by_the_tape"),
        pytest.param((), 20, 20, None, id="a_whole_chunk"),
        pytest.param((), 9, 10, (0, 110), id="without_checkpoints_from_the_start"),
        pytest.param((), 20, 120, (0, 0), id="to_the_start"),
        pytest.param((50, 80), 20, 10, (80, 110), id="from_the_nearest_checkpoint"),
        pytest.param((50, 80), 20, 40, (80, 80), id="to_a_checkpoint"),
        pytest.param((50, 80), 20, 41, (50, 79), id="from_one_further_back"),
        pytest.param((50, 80), 20, 110, (0, 10), id="before_all_checkpoints"),
    ],
)
def test_no_more_is_computed_than_needed(
    checkpoints: tuple[int, ...],
    last: int,
    n: int,
    anew: tuple[int, int] | None,
    model: Qwen,
    computed: list[list[int]],
) -> None:
    cache = cache_with(model, checkpoints=checkpoints, last=last)
    rewind(model, cache, TOKENS, n, step_size=64)
    assert cache.offset == 120 - n
    assert computed == ([] if anew is None or anew[0] == anew[1] else [TOKENS[slice(*anew)]])
    held = mx.array([[*TOKENS[: 120 - n], 5]])
    assert mx.abs(model(mx.array([[5]]), cache)[:, -1] - model(held)[:, -1]).max() < TOLERANCE


def test_chunks_are_no_longer_than_asked_for(model: Qwen) -> None:
    cache, lengths = cache_with(model), []
    embed = model.embed
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Qwen, "embed", lambda self, tokens: (lengths.append(tokens.shape[1]), embed(tokens))[1])
        rewind(model, cache, TOKENS, 50, step_size=32)
    assert lengths == [32, 32, 6]


@pytest.mark.parametrize(
    ("tokens", "n", "why"),
    [
        pytest.param(TOKENS, -1, "Cannot take back -1 tokens", id="negative"),
        pytest.param(TOKENS, 121, "Cannot take back 121 tokens: the cache holds 120", id="beyond_the_start"),
        pytest.param(TOKENS[1:], 50, "The cache holds 120 tokens, but 119 are given; pass all", id="other_tokens"),
    ],
)
def test_bad_arguments_change_nothing(tokens: list[int], n: int, why: str, model: Qwen) -> None:
    cache = cache_with(model)
    was = contents(cache)
    with pytest.raises(ValueError, match=why):
        rewind(model, cache, tokens, n, step_size=64)
    assert same(contents(cache), was)


def test_a_bad_step_size_changes_nothing(model: Qwen) -> None:
    cache = cache_with(model)
    was = contents(cache)
    with pytest.raises(ValueError, match="step_size must be at least 1 token, not 0"):
        rewind(model, cache, TOKENS, 50, step_size=0)
    assert same(contents(cache), was)


@pytest.mark.parametrize("padding", [None, [0, 4], [4]], ids=["two_rows", "padded_rows", "a_padded_row"])
def test_several_rows_are_not_computed_anew(padding: list[int] | None, model: Qwen) -> None:
    cache = model.make_cache(padding)
    rows = mx.array([TOKENS[:40], TOKENS[40:80]])[: len(padding or [0, 0])]
    for piece in mx.split(rows, [30, 35], axis=1):
        mx.eval(model(piece, cache), cache.arrays)
    was = contents(cache)
    with pytest.raises(ValueError, match="Cannot take back 6 tokens of a batch: only those of its last update"):
        rewind(model, cache, TOKENS[:40], 6, step_size=64)
    assert same(contents(cache), was)
    rewind(model, cache, TOKENS[:40], 3, step_size=64)
    assert cache.offset == 37
