"""The pieces of the model on their own: norms and gates against float64, dtypes, masks, independent rows."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from qwen_mlx.cache.recurrent import RecurrentCache
from qwen_mlx.model import gated_deltanet
from qwen_mlx.model.gated_deltanet import GatedDeltaNet
from qwen_mlx.model.norm import GatedRMSNorm, RMSNorm
from qwen_mlx.model.qwen import Qwen
from qwen_mlx.model.span import make_span
from tests.golden.checkpoints import VARIANTS

ROUNDING = {mx.float32: 1e-6, mx.bfloat16: 1.01 * 2**-8, mx.float16: 1.01 * 2**-11}
"""Relative error of one rounding and a little; in float32, of the several on the way."""
every_dtype = pytest.mark.parametrize("dtype", ROUNDING, ids=["float32", "bfloat16", "float16"])
every_variant = pytest.mark.parametrize("variant", VARIANTS)


def normal(*shape: int, seed: int = 0, scale: float = 1.0, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.array((scale * np.random.RandomState(seed).standard_normal(shape)).astype(np.float32)).astype(dtype)


def wide(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32), np.float64)


def relative_error(ours: mx.array, exact: np.ndarray) -> float:
    """Below 1e-4, where float16 loses digits, errors count as those of 1e-4."""
    return float((np.abs(wide(ours) - exact) / np.maximum(np.abs(exact), 1e-4)).max())


def prompts(rows: int, tokens: int) -> mx.array:
    return mx.array(np.random.RandomState(tokens).randint(0, 352, (rows, tokens)))


@every_dtype
@pytest.mark.parametrize("scale", [1e-3, 1.0])
def test_rms_norm_rounds_once(dtype: mx.Dtype, scale: float) -> None:
    norm = RMSNorm(64, 1e-6)
    norm.weight = 1 + 0.2 * normal(64, seed=1)
    x = normal(5, 64, scale=scale, dtype=dtype)
    exact = wide(x) / np.sqrt((wide(x) ** 2).mean(-1, keepdims=True) + 1e-6) * wide(norm.weight)
    assert norm(x).dtype == dtype
    assert relative_error(norm(x), exact) < ROUNDING[dtype]


@every_dtype
@pytest.mark.parametrize("scale", [1e-3, 1.0])
def test_gated_rms_norm_rounds_once(dtype: mx.Dtype, scale: float) -> None:
    norm = GatedRMSNorm(32, 1e-6)
    norm.weight = 1 + 0.2 * normal(32, seed=1)
    x, gate = normal(5, 32, scale=scale), normal(5, 32, seed=2, dtype=dtype)
    exact = wide(x) / np.sqrt((wide(x) ** 2).mean(-1, keepdims=True) + 1e-6) * wide(norm.weight)
    exact *= wide(gate) / (1 + np.exp(-wide(gate)))
    assert norm(x, gate).dtype == dtype
    assert relative_error(norm(x, gate), exact) < ROUNDING[dtype]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", ["b-r2-d64", "c-r3-d128"])
def test_gates_are_float32_behind_the_projections(
    variant: str, dtype: str, model_of: Callable[[str, str], Qwen]
) -> None:
    """softplus and exp in 16 bits would move a decay of 0.999 by more than what it forgets in a token."""
    model = model_of(variant, dtype)
    layer = model.model.layers[0].linear_attn
    x = normal(1, 20, model.config.text.hidden_size, dtype=model.dtype)
    g, beta = layer._gates(x)
    step = np.logaddexp(0, wide(layer.in_proj_a(x)) + wide(layer.dt_bias))
    assert g.dtype == beta.dtype == mx.float32
    assert relative_error(g, -np.exp(wide(layer.A_log)) * step) < 2e-6
    assert relative_error(beta, 1 / (1 + np.exp(-wide(layer.in_proj_b(x))))) < 2e-6


def test_the_delta_rule_gets_float32_in_a_bfloat16_model(
    model_of: Callable[[str, str], Qwen], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[mx.Dtype] = []
    rule = gated_deltanet.gated_delta_rule

    def record(*args: mx.array) -> tuple[mx.array, mx.array]:
        seen.extend(a.dtype for a in args)
        return rule(*args)

    monkeypatch.setattr(gated_deltanet, "gated_delta_rule", record)
    model_of("b-r2-d64", "bfloat16")(prompts(1, 20))
    assert len(seen) == 6 * 6  # q, k, v, g, beta, state in each of six linear layers
    assert set(seen) == {mx.float32}


def test_queries_and_keys_are_not_rounded_after_their_norm(
    model_of: Callable[[str, str], Qwen], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[mx.array] = []
    rule = gated_deltanet.gated_delta_rule

    def record(q: mx.array, k: mx.array, *rest: mx.array) -> tuple[mx.array, mx.array]:
        seen.extend((q, k))
        return rule(q, k, *rest)

    monkeypatch.setattr(gated_deltanet, "gated_delta_rule", record)
    model_of("b-r2-d64", "bfloat16")(prompts(1, 20))
    assert len(seen) == 2 * 6
    assert all((x != x.astype(mx.bfloat16).astype(mx.float32)).any() for x in seen)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=["float32", "bfloat16", "float16"])
@every_variant
def test_dtypes_through_the_model(variant: str, dtype: mx.Dtype, model_of: Callable[[str, str], Qwen]) -> None:
    """Activations, logits and what the cache keeps are of the model's dtype; recurrent states are float32."""
    model = model_of(variant, str(dtype).removeprefix("mlx.core."))
    cache = model.make_cache()
    x = model.embed(prompts(1, 3))
    hidden = model.hidden(x, cache)
    kept = [a.dtype for layer in cache.layers for a in layer.arrays]
    expected = [
        d for layer in cache.layers for d in ([dtype, mx.float32] if isinstance(layer, RecurrentCache) else [dtype])
    ]
    assert [x.dtype, hidden.dtype, model.logits(hidden).dtype] == [dtype] * 3
    assert kept == expected


@every_variant
def test_the_call_is_its_three_steps(variant: str, model_of: Callable[[str, str], Qwen]) -> None:
    model, tokens = model_of(variant, "float32"), prompts(2, 9)
    steps = model.logits(model.hidden(model.embed(tokens), model.make_cache()))
    assert mx.array_equal(model(tokens), steps)


def test_flat_positions_are_no_positions(model_of: Callable[[str, str], Qwen]) -> None:
    model, tokens = model_of("b-r2-d64", "float32"), prompts(1, 40)
    flat = mx.broadcast_to(mx.arange(40), (3, 1, 40))
    with_positions = model.hidden(model.embed(tokens), model.make_cache(), flat)
    without = model.hidden(model.embed(tokens), model.make_cache())
    assert mx.abs(with_positions - without).max() < 1e-4


def test_positions_reach_the_attention(model_of: Callable[[str, str], Qwen]) -> None:
    model, tokens = model_of("b-r2-d64", "float32"), prompts(1, 40)
    positions = mx.stack([mx.arange(40), mx.arange(40) // 5, mx.arange(40) % 5])[:, None]
    with_positions = model.hidden(model.embed(tokens), model.make_cache(), positions)
    without = model.hidden(model.embed(tokens), model.make_cache())
    assert mx.abs(with_positions - without).max() > 0.01


@every_variant
def test_rows_of_a_batch_do_not_see_each_other(variant: str, model_of: Callable[[str, str], Qwen]) -> None:
    model, tokens = model_of(variant, "float32"), prompts(3, 40)
    together = model(tokens)
    alone = mx.concatenate([model(tokens[i : i + 1]) for i in range(3)])
    assert mx.abs(together - alone).max() < 1e-4


@every_variant
def test_a_token_does_not_see_the_next_ones(variant: str, model_of: Callable[[str, str], Qwen]) -> None:
    model, tokens = model_of(variant, "float32"), np.array(prompts(1, 40))
    before = np.array(model(mx.array(tokens)))
    tokens[0, 25:] = (tokens[0, 25:] + 1) % 352
    after = np.array(model(mx.array(tokens)))
    assert np.abs(after - before)[0, :25].max() < 1e-4
    assert np.abs(after - before)[0, 25:].max() > 0.1


@pytest.mark.parametrize("filler", [0, 17, 352])
def test_what_stands_in_the_padding_does_not_matter(filler: int, model_of: Callable[[str, str], Qwen]) -> None:
    model, tokens = model_of("b-r2-d64", "float32"), prompts(1, 20)
    padded = mx.concatenate([mx.full((1, 13), filler, dtype=tokens.dtype), tokens], axis=1)
    ours = model(padded, model.make_cache(left_padding=[13]))
    assert mx.abs(ours[:, 13:] - model(tokens)).max() < 5e-4
    assert mx.isfinite(ours).all()


@pytest.mark.parametrize(("count", "expected"), [(1, None), (2, "causal")], ids=["one_token", "two_tokens"])
def test_span_without_padding(count: int, expected: str | None) -> None:
    span = make_span(count, 5)
    assert (span.attention, span.tokens, span.positions) == (expected, None, None)


@pytest.mark.parametrize(
    ("count", "offset", "attention", "tokens"),
    [
        pytest.param(3, 0, [[1, 0, 0], [0, 1, 0], [0, 1, 1]], [0, 1, 1], id="padding_inside"),
        pytest.param(2, 3, [[0, 1, 1, 1, 0], [0, 1, 1, 1, 1]], [1, 1], id="padding_behind"),
        pytest.param(1, 3, [[0, 1, 1, 1]], [1], id="one_token"),
    ],
)
def test_span_of_a_row_with_one_padding_token(count: int, offset: int, attention: list[Any], tokens: list[int]) -> None:
    span = make_span(count, offset, left_padding=mx.array([1]))
    assert isinstance(span.attention, mx.array)
    assert span.attention.astype(mx.int32).tolist() == [[attention]]
    assert span.tokens.astype(mx.int32).tolist() == [tokens]


def test_padding_leaves_an_empty_state_empty(model_of: Callable[[str, str], Qwen]) -> None:
    layer: GatedDeltaNet = model_of("b-r2-d64", "float32").model.layers[0].linear_attn
    cache = RecurrentCache()
    layer(normal(1, 5, 128), cache, mx.zeros((1, 5), mx.bool_))
    assert not any(array.any() for array in cache.arrays)
