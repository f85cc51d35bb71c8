"""Projections joined into one matmul: the same bits, the same names, no weight twice, and apart where kinds differ."""

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from qwen_mlx.load import load_model
from qwen_mlx.model.mlp import MLP
from qwen_mlx.model.projection import JointProjection, fuse_projections
from tests.golden.checkpoints import VARIANTS


class Pair(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.first, self.second = layers
        self._joint = JointProjection("first", "second")

    def __call__(self, x: mx.array) -> list[mx.array]:
        return self._joint(self, x)


def linear(size: int, out: int, seed: int, dtype: mx.Dtype = mx.float32) -> nn.Linear:
    layer = nn.Linear(size, out, bias=False)
    layer.weight = mx.random.normal((out, size), key=mx.random.key(seed)).astype(dtype)
    return layer


def quantized(size: int, out: int, seed: int, **form: object) -> nn.Module:
    return linear(size, out, seed).to_quantized(**form)


FORMS = {
    "float32": lambda out, seed: linear(64, out, seed),
    "bfloat16": lambda out, seed: linear(64, out, seed, mx.bfloat16),
    "affine 4": lambda out, seed: quantized(64, out, seed, bits=4, group_size=32),
    "affine 8": lambda out, seed: quantized(64, out, seed, bits=8, group_size=64),
    "mxfp4": lambda out, seed: quantized(64, out, seed, bits=4, group_size=32, mode="mxfp4"),
}
x = mx.random.normal((2, 3, 64), key=mx.random.key(9))


def same_bits(ours: list[mx.array], theirs: list[mx.array]) -> bool:
    return all(
        np.array_equal(np.array(a.astype(mx.float32)), np.array(b.astype(mx.float32))) for a, b in zip(ours, theirs)
    )


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("form", FORMS)
def test_results_have_the_same_bits(form: str, T: int) -> None:
    pair = Pair(FORMS[form](24, 1), FORMS[form](40, 2))
    token = x[:1, :T].astype(mx.bfloat16 if form == "bfloat16" else mx.float32)
    before = pair(token)
    mx.eval(before)
    fuse_projections(pair)
    assert same_bits(pair(token), before)
    assert [y.shape for y in before] == [(1, T, 24), (1, T, 40)]


@pytest.mark.parametrize("form", FORMS)
def test_weights_keep_names_and_values(form: str) -> None:
    pair = Pair(FORMS[form](24, 1), FORMS[form](40, 2))
    before = dict(tree_flatten(pair.parameters()))
    mx.eval(before)
    fuse_projections(pair)
    after = dict(tree_flatten(pair.parameters()))
    assert after.keys() == before.keys()
    assert same_bits(list(after.values()), list(before.values()))


def matmuls(tmp_path: Path, y: list[mx.array]) -> int:
    mx.export_to_dot(str(tmp_path / "graph.dot"), *y)
    return (tmp_path / "graph.dot").read_text().count('"Matmul"') + (tmp_path / "graph.dot").read_text().count(
        '"QuantizedMatmul"'
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("shape", "count"), [((1, 1), 1), ((1, 3), 2), ((2, 1), 2)], ids=["token", "prompt", "batch"])
def test_one_matmul_for_one_token(form: str, shape: tuple[int, int], count: int, tmp_path: Path) -> None:
    """More tokens keep a matmul each: their parts of a wider result would have to be copied."""
    pair = Pair(FORMS[form](24, 1), FORMS[form](40, 2))
    fuse_projections(pair)
    mx.eval(pair.parameters(), pair(x[:1, :1]))
    assert matmuls(tmp_path, pair(x[: shape[0], : shape[1]])) == count


@pytest.mark.parametrize("shape", [(1, 1), (2, 1)], ids=["token", "batch"])
def test_whole_rows_hold_every_part_where_it_is_said_to_be(shape: tuple[int, int]) -> None:
    pair, token = Pair(linear(64, 24, 1), linear(64, 40, 2)), x[: shape[0], : shape[1]]
    apart = pair(token)
    assert pair._joint.as_they_lie(pair, token)[1] == [0, 0]
    assert same_bits(pair._joint.as_they_lie(pair, token)[0], apart)
    fuse_projections(pair)
    wholes, starts = pair._joint.as_they_lie(pair, token)
    assert wholes[0] is wholes[1]
    parts = [whole[..., start : start + y.shape[-1]] for whole, start, y in zip(wholes, starts, apart)]
    assert all(np.allclose(a, b, rtol=1e-6, atol=1e-5) for a, b in zip(parts, apart))


@pytest.mark.parametrize(
    "other",
    [
        lambda: linear(64, 40, 2, mx.bfloat16),
        lambda: quantized(64, 40, 2, bits=4, group_size=32),
        lambda: quantized(64, 40, 2, bits=8, group_size=64),
    ],
    ids=["dtype", "bits", "class"],
)
def test_layers_of_different_kinds_stay_apart(other: Callable[[], nn.Module], tmp_path: Path) -> None:
    first = linear(64, 24, 1) if isinstance(other(), nn.Linear) else quantized(64, 24, 1, bits=8, group_size=32)
    pair = Pair(first, other())
    mx.eval(pair.parameters())
    fuse_projections(pair)
    assert matmuls(tmp_path, pair(x[:1, :1])) == 2


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_have_the_same_bits(variant: str, checkpoint_of: Callable[[str], Path]) -> None:
    model = load_model(checkpoint_of(variant), dtype="float32")

    def logits() -> list[mx.array]:
        cache = model.make_cache()
        rows = [model(mx.array([[5, 7, 11]]), cache), model(mx.array([[13]]), cache), model(mx.array([[17]]), cache)]
        mx.eval(rows)
        return rows

    before = logits()
    fuse_projections(model)
    assert same_bits(logits(), before)


def test_no_weight_is_kept_twice() -> None:
    """From lazy weights to the first token, the peak stays at the weights and one joint matrix."""
    mlp = MLP(512, 4096)
    for i, name in enumerate(("gate_proj", "up_proj", "down_proj")):
        layer = mlp[name]
        layer.weight = mx.random.normal(layer.weight.shape, key=mx.random.key(i))
    weights = sum(array.nbytes for _, array in tree_flatten(mlp.parameters()))
    joint = 2 * mlp.gate_proj.weight.nbytes
    fuse_projections(mlp)
    token = mx.ones((1, 1, 512))
    mx.eval(token)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(mlp(token), mlp(mx.ones((1, 4, 512))), mlp.parameters())
    assert mx.get_active_memory() - before < 1.01 * weights
    assert mx.get_peak_memory() - before < 1.01 * (weights + joint)
