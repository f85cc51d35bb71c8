"""Projections: exact for one token and for many, and what the one-token form of a CPU is made of."""

import re
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from qwen_mlx.model import linear
from qwen_mlx.model.linear import ROWS, Embedding, Linear


@pytest.mark.parametrize("tokens", [(1, 1), (1, 5), (3, 1)], ids=["token", "prompt", "batch"])
@pytest.mark.parametrize("rows", [3 * ROWS, ROWS, ROWS - 16, 16])
def test_products_are_those_of_float64(rows: int, tokens: tuple[int, int]) -> None:
    x, layer, embedding = mx.random.normal((*tokens, 96)), Linear(96, rows), Embedding(rows, 96)
    for weight, y in (layer.weight, layer(x)), (embedding.weight, embedding.as_linear(x)):
        wanted = np.array(x).astype(np.float64) @ np.array(weight).astype(np.float64).T
        assert y.shape == wanted.shape
        assert np.abs(np.array(y) - wanted).max() < 2e-6 * np.abs(wanted).max()


def operations(y: mx.array, folder: Path) -> list[str]:
    mx.export_to_dot(str(folder / "graph.dot"), y)
    return re.findall(r'label ="(\w+)', (folder / "graph.dot").read_text())


@pytest.mark.parametrize(("generation", "tokens", "in_pieces"), [(None, 1, True), (None, 2, False), (16, 1, False)])
def test_pieces_are_for_one_token_on_a_cpu(
    generation: int | None, tokens: int, in_pieces: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "gpu_generation", lambda: generation)
    layer, x = Linear(64, 2 * ROWS), mx.random.normal((1, tokens, 64))
    mx.eval(layer.parameters(), x)
    whole = operations(x @ layer.weight.T, tmp_path)
    assert (operations(layer(x), tmp_path) != whole) is in_pieces


def test_the_weight_is_not_copied_for_its_pieces() -> None:
    layer, x = Linear(1024, 16 * ROWS), mx.random.normal((1, 1, 1024))
    mx.eval(layer.parameters(), x)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(layer(x))
    assert mx.get_peak_memory() - before < layer.weight.nbytes / 16


def test_it_is_quantized_as_any_projection() -> None:
    layer = Linear(64, ROWS).to_quantized(group_size=32, bits=8)
    assert (layer.bits, layer.group_size, "bias" in layer) == (8, 32, False)


def test_the_model_has_no_other_kind_of_projection() -> None:
    """One made by MLX's class would be slow on a CPU without a word."""
    folder = Path(linear.__file__).parent
    assert not [path.name for path in folder.glob("*.py") if "= nn.Linear(" in path.read_text()]
