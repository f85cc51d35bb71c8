"""The mixture of experts against a loop over tokens in float64, plain and quantized, few rows and many."""

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest

from qwen_mlx.config import MoeConfig
from qwen_mlx.model import moe
from qwen_mlx.model.moe import SORT_FROM, ExpertLinear, SparseMoeBlock

D, EXPERTS, TOP, INNER, SHARED = 64, 8, 2, 96, 160
FORMS = [
    pytest.param(32, 4, "affine", id="affine_4"),
    pytest.param(32, 8, "affine", id="affine_8"),
    pytest.param(32, 4, "mxfp4", id="mxfp4"),
]
every_form = pytest.mark.parametrize(("group_size", "bits", "mode"), FORMS)
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
# Routed rows on both sides of the border from which they are sorted by expert.
every_count = pytest.mark.parametrize("tokens", [1, SORT_FROM // TOP - 1, SORT_FROM // TOP, 100])


def block() -> SparseMoeBlock:
    made = SparseMoeBlock(D, MoeConfig(EXPERTS, TOP, INNER, SHARED))
    random = np.random.RandomState(3)

    def matrix(*shape: int) -> mx.array:
        return mx.array((random.standard_normal(shape) / shape[-1] ** 0.5).astype(np.float32))

    made.gate.weight = 4 * matrix(EXPERTS, D)
    made.shared_expert_gate.weight = matrix(1, D)
    for mlp, lead, inner in ((made.switch_mlp, (EXPERTS,), INNER), (made.shared_expert, (), SHARED)):
        mlp.gate_proj.weight, mlp.up_proj.weight = matrix(*lead, inner, D), matrix(*lead, inner, D)
        mlp.down_proj.weight = matrix(*lead, D, inner)
    return made


def rows(tokens: int) -> mx.array:
    return mx.array(np.random.RandomState(tokens).standard_normal((1, tokens, D)).astype(np.float32))


def float64_block(made: SparseMoeBlock, x: mx.array) -> np.ndarray:
    """One token after the other: softmax over all experts, the largest few renormalised to 1, and the shared expert."""

    def weight(module: ExpertLinear) -> np.ndarray:
        return np.array(module.weight, np.float64)

    def feed(mlp: object, y: np.ndarray, *expert: int) -> np.ndarray:
        gate, up, down = (weight(getattr(mlp, name))[expert] for name in PROJECTIONS)
        hidden = gate @ y
        return down @ (hidden / (1 + np.exp(-hidden)) * (up @ y))

    out = []
    for y in np.array(x[0], np.float64):
        scores = np.exp(weight(made.gate) @ y)
        probabilities = scores / scores.sum()
        chosen = sorted(range(EXPERTS), key=lambda e: -probabilities[e])[:TOP]
        routed = sum(probabilities[e] * feed(made.switch_mlp, y, e) for e in chosen)
        gate = 1 / (1 + np.exp(-(weight(made.shared_expert_gate) @ y)))
        out.append(routed / probabilities[chosen].sum() + gate * feed(made.shared_expert, y))
    return np.stack(out)[None]


def largest(ours: mx.array, exact: np.ndarray) -> float:
    return float(np.abs(np.array(ours, np.float64) - exact).max())


@every_count
def test_equals_the_loop_in_float64(tokens: int) -> None:
    made, x = block(), rows(tokens)
    assert largest(made(x), float64_block(made, x)) < 1e-5


@every_count
def test_sorting_by_expert_changes_nothing(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made, x = block(), rows(tokens)
    monkeypatch.setattr(moe, "SORT_FROM", 0)
    by_expert = np.array(made(x))
    monkeypatch.setattr(moe, "SORT_FROM", 10**9)
    assert largest(made(x), by_expert) < 1e-6


def test_rows_are_sorted_where_sorting_is_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    """`sorted_indices` is a promise to the kernel; on a CPU nothing comes of breaking it, on a GPU wrong numbers."""
    seen: list[tuple[list[int], bool]] = []
    compute: Callable[..., mx.array] = ExpertLinear.__call__

    def record(self: ExpertLinear, x: mx.array, experts: mx.array, *, ordered: bool) -> mx.array:
        seen.append((experts.tolist(), ordered))
        return compute(self, x, experts, ordered=ordered)

    monkeypatch.setattr(ExpertLinear, "__call__", record)
    block()(rows(SORT_FROM // TOP))
    assert len(seen) == 3
    assert all(ordered and experts == sorted(experts) for experts, ordered in seen)


def test_a_batch_is_its_tokens() -> None:
    made, x = block(), rows(12)
    assert largest(made(x.reshape(3, 4, D)).reshape(1, 12, D), np.array(made(x))) < 1e-6


@every_form
@every_count
def test_quantized_experts_equal_dequantized_ones(tokens: int, group_size: int, bits: int, mode: str) -> None:
    made, x = block(), rows(tokens)
    plain = made.switch_mlp
    rounded = {}
    for name in PROJECTIONS:
        layer = getattr(plain, name).to_quantized(group_size=group_size, bits=bits, mode=mode)
        setattr(plain, name, layer)
        rounded[name] = mx.dequantize(layer.weight, layer.scales, layer.biases, group_size, bits, mode=mode)
    quantized = np.array(made(x))
    for name, weight in rounded.items():
        layer = ExpertLinear(1, 1, 1)
        layer.weight = weight.astype(mx.float32)
        setattr(plain, name, layer)
    assert largest(made(x), quantized) < 1e-5


@every_form
def test_quantized_experts_hold_what_mlx_quantizes(group_size: int, bits: int, mode: str) -> None:
    weight = block().switch_mlp.up_proj.weight
    layer = block().switch_mlp.up_proj.to_quantized(group_size=group_size, bits=bits, mode=mode)
    packed, scales, *biases = mx.quantize(weight, group_size, bits, mode=mode)
    assert mx.array_equal(layer.weight, packed)
    assert mx.array_equal(layer.scales, scales)
    assert [layer.biases is None] == [not biases]


def test_bfloat16_stays_bfloat16() -> None:
    made = block()
    made.set_dtype(mx.bfloat16)
    assert made(rows(5).astype(mx.bfloat16)).dtype == mx.bfloat16
