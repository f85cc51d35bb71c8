"""A long text takes no more than its keys and values: nothing else grows with the tokens, in MLX or in Python."""

import gc
from collections.abc import Callable, Iterable, Sequence

import mlx.core as mx
import pytest

from qwen_mlx.cache.kv import KVCache
from qwen_mlx.cache.sequence import SequenceCache
from qwen_mlx.decoding.autoregressive import decode
from qwen_mlx.decoding.drafters import MTPDrafter
from qwen_mlx.decoding.prefill import prefill
from qwen_mlx.decoding.sampling import Sampler, SamplingParams
from qwen_mlx.decoding.speculative import Decoded, Drafting, decode_with_drafts
from qwen_mlx.model import qwen
from qwen_mlx.model.qwen import Qwen
from tests import metal_emulator
from tests.decoding.test_speculative import DEMO, DEMO_HEAD, Turns

SETTLED = 600
"""Tokens after which everything that is made once has been made."""
PROMPT = [1, 2, 3]


def kept(caches: Sequence[KVCache]) -> dict[str, int]:
    """Arrays and other objects of Python that are alive, and bytes of MLX beside the keys and values."""
    mx.synchronize()
    gc.collect()
    objects = gc.get_objects()
    slabs = sum(array.nbytes for cache in caches for array in cache.arrays)
    return {
        "arrays": sum(isinstance(each, mx.array) for each in objects),
        "objects": len(objects),
        "bytes": mx.get_active_memory() - slabs,
    }


def slabs_of(cache: SequenceCache) -> list[KVCache]:
    return [layer for layer in cache.layers if isinstance(layer, KVCache)]


def growth(said: Iterable[Decoded], caches: Sequence[KVCache], every: int) -> dict[str, int]:
    """By how much what is alive grows from the first to any later one of the places `every` so many tokens."""
    found = [kept(caches) for i, _ in enumerate(said) if i >= SETTLED and (i - SETTLED) % every == 0]
    assert len(found) >= 5
    return {name: max(each[name] for each in found[1:]) - found[0][name] for name in found[0]}


def sampler_of(model: Qwen) -> Sampler:
    params = SamplingParams(temperature=0.0)
    return Sampler(params, PROMPT, vocab_size=model.config.text.vocab_size, num_real_tokens=352)


def decoded(model: Qwen, count: int, every: int) -> dict[str, int]:
    """What `count` tokens of the plain loop add."""
    cache = model.make_cache()
    logits = prefill(model, PROMPT, cache, step_size=8)
    return growth(decode(model, logits, cache, sampler_of(model), count=count), slabs_of(cache), every)


def test_20000_tokens(model_of: Callable[[str, str], Qwen]) -> None:
    """A graph that grew would hold tens of objects a token; a few arrays come and go between two tokens."""
    more = decoded(model_of("f-k32-v64", "float32"), 20000, every=4849)
    assert more["arrays"] == 0
    assert more["objects"] < 100
    assert more["bytes"] < 2**17


def test_2000_tokens_through_the_compiled_step(
    model_of: Callable[[str, str], Qwen], monkeypatch: pytest.MonkeyPatch
) -> None:
    metal_emulator.require()
    monkeypatch.setattr(qwen, "gpu_generation", lambda: 16)
    more = decoded(model_of("a-r1-d32", "float32"), 2000, every=256)
    assert more["arrays"] == 0
    assert more["objects"] < 100
    assert more["bytes"] < 2**17


def test_1200_tokens_with_drafts() -> None:
    """What a cache keeps to go back, a state of each layer, is there between some tokens and not between others. Drafts
    that were kept, with their logits or hidden states, would add thousands of arrays."""
    drafter, cache = MTPDrafter(DEMO, DEMO_HEAD), DEMO.make_cache()
    logits = prefill(DEMO, PROMPT, cache, step_size=8, seen=drafter.take)
    drafting = Drafting(drafter, Turns(2, 2, 2, 2, 1, 2, 2, 2, 0), DEMO_HEAD)
    said = decode_with_drafts(DEMO, logits, cache, sampler_of(DEMO), count=1200, drafting=drafting)
    more = growth(said, [*slabs_of(cache), drafter._cache], every=120)
    assert more["arrays"] < 64
    assert more["objects"] < 200
    assert more["bytes"] < 2**21
