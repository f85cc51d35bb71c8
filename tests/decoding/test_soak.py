"""A long text takes no more than its keys and values: nothing else grows with the tokens, in MLX or in Python."""

import gc
from collections.abc import Callable

import mlx.core as mx
import pytest

from qwen_mlx.cache.kv import KVCache
from qwen_mlx.cache.sequence import SequenceCache
from qwen_mlx.decoding.autoregressive import decode
from qwen_mlx.decoding.prefill import prefill
from qwen_mlx.decoding.sampling import Sampler, SamplingParams
from qwen_mlx.model import qwen
from qwen_mlx.model.qwen import Qwen
from tests import metal_emulator

SETTLED = 600
"""Tokens after which everything that is made once has been made."""


def kept(cache: SequenceCache) -> dict[str, int]:
    """Arrays and other objects of Python that are alive, and bytes of MLX beside the keys and values."""
    mx.synchronize()
    gc.collect()
    objects = gc.get_objects()
    slabs = sum(array.nbytes for layer in cache.layers if isinstance(layer, KVCache) for array in layer.arrays)
    return {
        "arrays": sum(isinstance(each, mx.array) for each in objects),
        "objects": len(objects),
        "bytes": mx.get_active_memory() - slabs,
    }


def decoded(model: Qwen, count: int, every: int) -> list[dict[str, int]]:
    """What is alive after every so many of `count` decoded tokens."""
    cache = model.make_cache()
    logits = prefill(model, [1, 2, 3], cache, step_size=8)
    params = SamplingParams(temperature=0.0)
    sampler = Sampler(params, [1, 2, 3], vocab_size=model.config.text.vocab_size, num_real_tokens=352)
    return [
        kept(cache)
        for i, _ in enumerate(decode(model, logits, cache, sampler, count=count))
        if i >= SETTLED and (i - SETTLED) % every == 0
    ]


def growth(found: list[dict[str, int]]) -> dict[str, int]:
    return {name: max(each[name] for each in found[1:]) - found[0][name] for name in found[0]}


def test_20000_tokens(model_of: Callable[[str, str], Qwen]) -> None:
    """A graph that grew would hold tens of objects a token; a few arrays come and go between two tokens."""
    found = decoded(model_of("f-k32-v64", "float32"), 20000, every=4849)
    assert len(found) == 5
    more = growth(found)
    assert more["arrays"] == 0
    assert more["objects"] < 100
    assert more["bytes"] < 2**17


def test_2000_tokens_through_the_compiled_step(
    model_of: Callable[[str, str], Qwen], monkeypatch: pytest.MonkeyPatch
) -> None:
    metal_emulator.require()
    monkeypatch.setattr(qwen, "gpu_generation", lambda: 16)
    more = growth(decoded(model_of("a-r1-d32", "float32"), 2000, every=256))
    assert more["arrays"] == 0
    assert more["objects"] < 100
    assert more["bytes"] < 2**17
