"""Rows that come and go: the next logits of each are those of its own cache."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from qwen_mlx import load
from qwen_mlx.cache import rows
from qwen_mlx.cache.rows import chosen, joined
from qwen_mlx.cache.sequence import SequenceCache
from qwen_mlx.config import parse_config
from qwen_mlx.model.rope import RotaryEmbedding
from tests.golden.checkpoints import VARIANTS, config
from tests.golden.yarn import SETTINGS, rope_parameters

MODEL, TOKENIZER = load("demo", dtype="float32")
TOLERANCE = 1e-4
TEXT = TOKENIZER.encode(
    "Once upon a time there was a cat. The cat had a red ball and a small boat. One day it went out."
)


def after(tokens: Sequence[int]) -> SequenceCache:
    cache = MODEL.make_cache()
    MODEL(mx.array([list(tokens)]), cache)
    return cache


def next_logits(cache: SequenceCache, tokens: Sequence[int]) -> np.ndarray:
    """[B, V], where row i takes tokens[i] in."""
    return np.array(MODEL.step(mx.array(list(tokens))[:, None], cache)[0])


def expected(texts: Sequence[Sequence[int]]) -> np.ndarray:
    """[B, V]: the last logits of each text, all of it computed at once and without a cache."""
    return np.stack([np.array(MODEL(mx.array([list(text)]))[0, -1]) for text in texts])


@pytest.mark.parametrize("lengths", [(3, 9, 5), (9, 3), (4,), (6, 6)], ids=str)
def test_joined(lengths: tuple[int, ...]) -> None:
    texts = [TEXT[n : n + length + 1] for n, length in enumerate(lengths)]
    cache = joined([after(text[:-1]) for text in texts], MODEL.turn)
    assert cache.offset == max(lengths)
    assert cache.left_padding is not None
    assert cache.left_padding.tolist() == [max(lengths) - length for length in lengths]
    logits = next_logits(cache, [text[-1] for text in texts])
    np.testing.assert_allclose(logits, expected(texts), atol=TOLERANCE)


@pytest.mark.parametrize("length", [2, 15], ids=["a_shorter", "a_longer"])
def test_one_joins_a_batch(length: int) -> None:
    texts = [TEXT[:4], TEXT[2:10], TEXT[3 : 4 + length]]
    two = joined([after(text[:-1]) for text in texts[:2]], MODEL.turn)
    cache = joined([two, after(texts[2][:-1])], MODEL.turn)
    logits = next_logits(cache, [text[-1] for text in texts])
    np.testing.assert_allclose(logits, expected(texts), atol=TOLERANCE)


@pytest.mark.parametrize("order", [[0], [2, 0], [1, 2], [2, 1, 0]], ids=str)
def test_chosen(order: list[int]) -> None:
    texts = [TEXT[:4], TEXT[2:12], TEXT[3:9]]
    cache = chosen(joined([after(text[:-1]) for text in texts], MODEL.turn), order, MODEL.turn)
    logits = next_logits(cache, [texts[i][-1] for i in order])
    np.testing.assert_allclose(logits, expected([texts[i] for i in order]), atol=TOLERANCE)


@pytest.mark.parametrize(("trim", "offset"), [(5, 5), (6, 10)], ids=["as_much_as_TRIM", "less_than_TRIM"])
def test_padding_of_all_rows_is_given_up(monkeypatch: pytest.MonkeyPatch, trim: int, offset: int) -> None:
    monkeypatch.setattr(rows, "TRIM", trim)
    texts = [TEXT[:4], TEXT[2:13], TEXT[3:9]]  # 3, 10 and 5 tokens and one more; without the second 5 are padding
    cache = chosen(joined([after(text[:-1]) for text in texts], MODEL.turn), [0, 2], MODEL.turn)
    assert cache.offset == offset
    logits = next_logits(cache, [texts[0][-1], texts[2][-1]])
    np.testing.assert_allclose(logits, expected([texts[0], texts[2]]), atol=TOLERANCE)


def test_caches_that_are_joined_stay_as_they_were() -> None:
    short, long = after(TEXT[:3]), after(TEXT[:9])
    joined([short, long], MODEL.turn)
    np.testing.assert_allclose(next_logits(short, [TEXT[3]]), expected([TEXT[:4]]), atol=TOLERANCE)


def rope(parameters: dict[str, Any] | None) -> RotaryEmbedding:
    raw = config(VARIANTS["c-r3-d128"])
    if parameters is not None:
        raw["text_config"]["rope_parameters"] = parameters
    text = parse_config(raw, {}, Path("nowhere")).text
    return RotaryEmbedding(text.rotary_dim, text.rope_parameters)


@pytest.mark.parametrize("places", [0, 1, 9, 300, -7])
@pytest.mark.parametrize("setting", [None, "card", "short", "attention_factor"])
def test_turned_is_rotated_at_the_later_place(setting: str | None, places: int) -> None:
    """With YaRN what is rotated becomes longer; turned, it does not become so once more."""
    rotary = rope(None if setting is None else rope_parameters(SETTINGS[setting]))
    x = mx.random.normal((2, 1, 5, 256), key=mx.random.key(0))
    turned = rotary.turned(rotary(x, 11), places)
    np.testing.assert_allclose(np.array(turned), np.array(rotary(x, 11 + places)), atol=1e-4 if places > 99 else 1e-5)


def test_turned_keeps_the_dtype() -> None:
    x = mx.ones((1, 1, 2, 256), mx.bfloat16)
    assert rope(None).turned(x, 3).dtype == mx.bfloat16
