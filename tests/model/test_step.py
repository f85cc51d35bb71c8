"""The compiled decode step: the bits of the eager one, over every growth of the slabs, and traced no more than that."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from qwen_mlx.cache.kv import SLAB, KVCache
from qwen_mlx.cache.sequence import SequenceCache
from qwen_mlx.load import load_model
from qwen_mlx.model import qwen
from qwen_mlx.model.qwen import Qwen
from qwen_mlx.model.step import CompiledStep
from tests import metal_emulator
from tests.golden.checkpoints import VARIANTS


@pytest.fixture(autouse=True)
def compiler() -> None:
    """Without Metal, MLX compiles with g++."""
    metal_emulator.require()


class CountedStep(CompiledStep):
    """Counts how often its graph is made."""

    def __init__(self, model: Qwen) -> None:
        self.traces = 0

        def forward(*arguments: Any) -> tuple[mx.array, mx.array]:
            self.traces += 1
            return model._forward(*arguments)

        super().__init__(forward, model.config.text.layer_types)


def step_of(model: Qwen) -> CountedStep:
    mx.eval(model.parameters())
    return CountedStep(model)


def prompt(rows: int, tokens: int) -> mx.array:
    return mx.array(np.random.RandomState(tokens).randint(0, 352, (rows, tokens)))


def after_prompt(model: Qwen, rows: int, tokens: int, padding: list[int] | None = None) -> SequenceCache:
    cache = model.make_cache(padding)
    mx.eval(model(prompt(rows, tokens), cache), cache.arrays)
    return cache


def largest_difference(model: Qwen, step: CompiledStep, caches: list[SequenceCache], count: int) -> float:
    """Of any logit over `count` tokens, each the eager model's choice, which both then take in."""
    eager, compiled = caches
    token, worst = prompt(eager.arrays[0].shape[0], 1), 0.0
    for _ in range(count):
        logits, (ours, _) = model(token, eager), step(token, compiled)
        worst = max(worst, float(mx.abs(logits - ours).max().item()))
        token = mx.argmax(logits[:, -1], axis=-1)[:, None]
    return worst


@pytest.mark.parametrize("variant", VARIANTS)
def test_bits_of_the_eager_model(variant: str, model_of: Callable[[str, str], Qwen]) -> None:
    model = model_of(variant, "float32")
    caches = [after_prompt(model, 1, SLAB - 3) for _ in range(2)]
    assert largest_difference(model, step_of(model), caches, 6) == 0
    assert caches[0].offset == caches[1].offset == SLAB + 3


def test_bits_of_the_eager_model_in_bfloat16(model_of: Callable[[str, str], Qwen]) -> None:
    model = model_of("b-r2-d64", "bfloat16")
    caches = [after_prompt(model, 1, 20) for _ in range(2)]
    assert largest_difference(model, step_of(model), caches, 6) == 0


@pytest.mark.parametrize("padding", [None, [0, 0, 0], [3, 0, 19]], ids=["no_padding", "zeros", "padded_rows"])
def test_rows_of_a_batch(padding: list[int] | None, model_of: Callable[[str, str], Qwen]) -> None:
    model = model_of("b-r2-d64", "float32")
    caches = [after_prompt(model, 3, 20, padding) for _ in range(2)]
    assert largest_difference(model, step_of(model), caches, 4) == 0


@pytest.mark.parametrize(("start", "count", "traces"), [(5, 20, 1), (SLAB - 5, 20, 2), (SLAB - 1, 1, 1), (SLAB, 1, 1)])
def test_traced_once_for_a_length_of_the_slabs(
    start: int, count: int, traces: int, model_of: Callable[[str, str], Qwen]
) -> None:
    model = model_of("b-r2-d64", "float32")
    step, cache = step_of(model), after_prompt(model, 1, start)
    for i in range(count):
        mx.eval(step(prompt(1, i + 1)[:, -1:], cache))
    assert step.traces == traces


def test_another_sequence_at_another_place_takes_the_same_graph(model_of: Callable[[str, str], Qwen]) -> None:
    model = model_of("b-r2-d64", "float32")
    step = step_of(model)
    assert largest_difference(model, step, [after_prompt(model, 1, 7) for _ in range(2)], 3) == 0
    assert largest_difference(model, step, [after_prompt(model, 1, 100) for _ in range(2)], 3) == 0
    assert step.traces == 1


def test_a_snapshot_stays_what_it_was(model_of: Callable[[str, str], Qwen]) -> None:
    model = model_of("b-r2-d64", "float32")
    step, cache = step_of(model), after_prompt(model, 1, 20)
    snapshot = cache.snapshot()
    first = np.array(step(prompt(1, 1), cache)[0])
    mx.eval(step(prompt(1, 2)[:, -1:], cache))
    cache.restore(snapshot)
    assert cache.offset == 20
    assert np.array_equal(np.array(step(prompt(1, 1), cache)[0]), first)


def same_arrays(one: SequenceCache, other: SequenceCache) -> bool:
    """Of what a next token can see."""
    seen = [[a[..., : cache.offset, :] if a.ndim == 5 else a for a in cache.arrays] for cache in (one, other)]
    return all(mx.array_equal(a, b).item() for a, b in zip(*seen, strict=True))


@pytest.mark.parametrize("start", [20, SLAB - 1, SLAB])
def test_a_step_taken_back_never_was(start: int, model_of: Callable[[str, str], Qwen]) -> None:
    model = model_of("b-r2-d64", "float32")
    step, cache, other = step_of(model), after_prompt(model, 1, start), after_prompt(model, 1, start)
    for i in range(3):
        step(prompt(1, 1), cache)
        cache.rewind(1)
        assert cache.offset == start + i
        assert same_arrays(cache, other)
        for both in (cache, other):
            step(prompt(1, i + 2)[:, -1:], both)
    assert same_arrays(cache, other)
    with pytest.raises(ValueError, match="the last update had 1, of which all can be taken back"):
        cache.rewind(2)


def test_an_update_of_several_tokens_taken_back_between_steps(model_of: Callable[[str, str], Qwen]) -> None:
    """As when a draft is verified: five tokens, of which two stay."""
    model = model_of("b-r2-d64", "float32")
    step, caches = step_of(model), [after_prompt(model, 1, 20) for _ in range(2)]
    for count, cache in zip((5, 2), caches):
        step(prompt(1, 1), cache)
        mx.eval(model(prompt(1, 5)[:, :count], cache))
    caches[0].rewind(3)
    assert caches[0].offset == caches[1].offset
    assert largest_difference(model, step, caches, 4) < 5e-4


def test_slabs_are_written_in_place_on_a_cpu(model_of: Callable[[str, str], Qwen]) -> None:
    """A step that copied its slabs of 128 MiB would show in the peak. Each step ends before the next begins: of a GPU
    with two of them under way this says nothing."""
    model = model_of("b-r2-d64", "float32")
    step, cache = step_of(model), after_prompt(model, 1, 5)
    for layer in cache.layers:
        if isinstance(layer, KVCache):
            _, _, heads, _, size = layer.slab.shape
            layer.slab = mx.zeros((2, 1, heads, 2**24 // (heads * size), size))
    mx.eval(cache.arrays, step(prompt(1, 1), cache))
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(step(prompt(1, 1), cache), cache.arrays)
    assert mx.get_peak_memory() - before < 2**26


def test_without_metal_the_model_steps_eagerly(model_of: Callable[[str, str], Qwen]) -> None:
    model = model_of("b-r2-d64", "float32")
    cache = after_prompt(model, 1, 5)
    assert model.step(prompt(1, 1), cache)[0].shape == (1, model.config.text.vocab_size)
    assert model._compiled_step is None


@pytest.fixture
def on_metal(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model takes the compiled step, as it does there."""
    monkeypatch.setattr(qwen, "gpu_generation", lambda: 16)


@pytest.mark.usefixtures("on_metal")
def test_the_first_token_of_all_is_stepped_eagerly(model_of: Callable[[str, str], Qwen]) -> None:
    model = model_of("b-r2-d64", "float32")
    cache = model.make_cache()
    logits = [model.step(mx.array([[token]]), cache)[0] for token in (3, 4)]
    expected = model(mx.array([[3, 4]]))
    assert cache.offset == 2
    assert mx.abs(mx.stack(logits, axis=1) - expected).max() < 5e-4


@pytest.mark.usefixtures("on_metal")
def test_a_model_that_has_stepped_is_freed_when_nobody_holds_it(checkpoint_of: Callable[[str], Path]) -> None:
    """Without the garbage collector: gigabytes must not wait for it."""
    gc.collect()
    gc.disable()
    try:
        before = mx.get_active_memory()
        model = load_model(checkpoint_of("b-r2-d64"), dtype="float32")
        cache = after_prompt(model, 1, 5)
        mx.eval(model.step(prompt(1, 1), cache))
        assert model._compiled_step is not None
        held = mx.get_active_memory()
        del model, cache
        assert mx.get_active_memory() - before < (held - before) / 10
    finally:
        gc.enable()
