"""Memory while a text is made: limits set and restored, and no more at the peak than weights, state and one chunk."""

from collections.abc import Callable, Iterator
from contextlib import suppress

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from qwen_mlx import load, stream_generate
from qwen_mlx.decoding import memory
from qwen_mlx.decoding.autoregressive import decode
from qwen_mlx.decoding.memory import CACHED_BYTES, device_limits
from qwen_mlx.decoding.prefill import prefill
from qwen_mlx.decoding.sampling import Sampler, SamplingParams
from qwen_mlx.model.qwen import Qwen

CHUNK = 128


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """A device that recommends 1000 bytes; the limits it has, wired and cache."""
    found = {"wired": 7, "cache": 8}

    def setter(name: str) -> Callable[[int], int]:
        def put(limit: int) -> int:
            before, found[name] = found[name], limit
            return before

        return put

    monkeypatch.setattr(memory, "gpu_generation", lambda: 16)
    monkeypatch.setattr(memory.mx, "device_info", lambda: {"max_recommended_working_set_size": 1000})
    monkeypatch.setattr(memory.mx, "set_wired_limit", setter("wired"))
    monkeypatch.setattr(memory.mx, "set_cache_limit", setter("cache"))
    return found


def test_limits_are_those_of_the_device(limits: dict[str, int]) -> None:
    with device_limits():
        assert limits == {"wired": 1000, "cache": CACHED_BYTES}
    assert limits == {"wired": 7, "cache": 8}


def test_limits_are_restored_after_an_error(limits: dict[str, int]) -> None:
    with suppress(KeyError), device_limits():
        raise KeyError
    assert limits == {"wired": 7, "cache": 8}


@pytest.mark.parametrize("tokens", [1, 5], ids=["left_early", "to_the_end"])
def test_a_generation_sets_and_restores_them(tokens: int, limits: dict[str, int]) -> None:
    responses = stream_generate(*load("demo"), "Once upon a time", max_tokens=5, force=True)
    for _ in range(tokens):
        next(responses)
        assert limits["wired"] == 1000
    responses.close()
    assert limits == {"wired": 7, "cache": 8}


def test_texts_that_overlap_restore_them_with_the_last(limits: dict[str, int]) -> None:
    one, other = device_limits(), device_limits()
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    assert limits == {"wired": 1000, "cache": CACHED_BYTES}
    other.__exit__(None, None, None)
    assert limits == {"wired": 7, "cache": 8}
    with device_limits():
        assert limits["wired"] == 1000


def test_without_metal_no_limit_is_touched(limits: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "gpu_generation", lambda: None)
    with device_limits():
        assert limits == {"wired": 7, "cache": 8}


def peak_of(work: Callable[[], object]) -> int:
    """Bytes at the peak of `work`, everything that is held before included."""
    mx.synchronize()
    mx.clear_cache()
    mx.reset_peak_memory()
    work()
    mx.synchronize()
    return mx.get_peak_memory()


def generation(model: Qwen, tokens: list[int], count: int) -> int:
    """Bytes of the state at the end."""
    cache = model.make_cache()
    sampler = Sampler(
        SamplingParams(temperature=0.0), tokens, vocab_size=model.config.text.vocab_size, num_real_tokens=352
    )
    for _ in decode(model, prefill(model, tokens, cache, step_size=CHUNK), cache, sampler, count=count):
        pass
    return cache.nbytes


def last_chunk(model: Qwen, tokens: list[int], held: int) -> int:
    """Bytes beside weights and state. Of all chunks it takes most: without Metal, its scores with all keys are held."""
    cache = model.make_cache()
    prefill(model, tokens[:-CHUNK], cache, step_size=CHUNK)
    return peak_of(lambda: prefill(model, tokens[-CHUNK:], cache, step_size=CHUNK)) - held - cache.nbytes


@pytest.mark.parametrize("variant", ["a-r1-d32", "c-r3-d128", "d-moe"])
def test_peak_is_weights_state_and_one_chunk(variant: str, model_of: Callable[[str, str], Qwen]) -> None:
    """Ten chunks of a prompt and three slabs of an answer's keys; nothing of the chunks before is left."""
    model = model_of(variant, "float32")
    mx.eval(model.parameters())
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 352, 10 * CHUNK).tolist()
    generation(model, tokens[:CHUNK], 2)  # constants that stay from the first call on
    held = mx.get_active_memory()
    assert held >= sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    chunk = last_chunk(model, tokens, held)
    state = generation(model, tokens, 300)
    assert peak_of(lambda: generation(model, tokens, 300)) <= 1.15 * (held + state + chunk)
