"""The launches of a decoded token: the line that is held, what a layer is made of, and the counting itself."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from benchmarks.checkpoint import TEXT_CONFIG
from qwen_mlx.bench import launches as command
from qwen_mlx.bench.launch_count import count_step, launches, stand_ins
from qwen_mlx.bench.launch_peer import count_peer_step
from qwen_mlx.bench.launches import ledger
from qwen_mlx.config import ModelConfig, read_config
from qwen_mlx.kernels.add_rms_norm import add_rms_norm
from qwen_mlx.model.projection import fuse_projections
from qwen_mlx.model.qwen import Qwen

FOUR_BILLION = {
    "num_hidden_layers": 32, "hidden_size": 2560, "num_attention_heads": 16, "num_key_value_heads": 4,
    "intermediate_size": 9216, "linear_num_value_heads": 32,
}  # fmt: skip
SHAPES = {"0.8B": {"num_hidden_layers": 24}, "4B": FOUR_BILLION}


def config_of(shape: str, folder: Path) -> ModelConfig:
    text = {**TEXT_CONFIG, **SHAPES[shape]}
    config = {"model_type": "qwen3_5", "text_config": text, "tie_word_embeddings": True, "eos_token_id": []}
    (folder / "config.json").write_text(json.dumps(config))
    return read_config(folder)


def model_of(shape: str, folder: Path, bits: int | None) -> Qwen:
    """Never evaluated: only its shapes are looked at."""
    model = Qwen(config_of(shape, folder))
    model.dtype = mx.bfloat16
    wide = ("norm.weight", "A_log", "dt_bias")
    model.apply_to_modules(lambda _, module: module.set_dtype(mx.bfloat16))
    model.load_weights(
        [(name, a.astype(mx.float32)) for name, a in tree_flatten(model.parameters()) if name.endswith(wide)],
        strict=False,
    )
    if bits:
        nn.quantize(model, 64, bits)
    fuse_projections(model)
    return model


@pytest.mark.parametrize("bits", [None, 4], ids=["bfloat16", "4_bit"])
@pytest.mark.parametrize(("shape", "most"), [("0.8B", 250), ("4B", 330)])
def test_the_line_is_held(shape: str, most: int, bits: int | None, tmp_path: Path) -> None:
    model = model_of(shape, tmp_path, bits)
    total = count_step(model).total()
    assert total <= most
    assert total <= 10 * model.config.text.num_hidden_layers + 10  # beside the layers: embedding, mask, head, argmax


def test_what_a_layer_is_made_of(tmp_path: Path) -> None:
    model = model_of("0.8B", tmp_path, 4)
    found = ledger(lambda layers: count_step(model, layers), model.config.text.layer_types)
    # qkv with z, a with b, out, gate with up, down; the mixer and two sums with their norms; SwiGLU
    assert found["linear attention layer"] == {"total": 9, "matmul": 5, "own kernel": 3, "fused elementwise": 1}
    # q, k, v, out, gate with up, down; heads and two sums; SwiGLU and the output gate; where to write, and the copy
    assert found["full attention layer"] == {
        "total": 12, "matmul": 4, "own kernel": 3, "fused elementwise": 2, "write of keys and values": 2, "attention": 1
    }  # fmt: skip
    layers = 18 * found["linear attention layer"]["total"] + 6 * found["full attention layer"]["total"]
    assert 0 < found["step"]["total"] - layers < 12  # embedding, first norm, mask, head, argmax


def test_mlx_lm_has_more_than_twice_as_many(tmp_path: Path) -> None:
    """Some 620 by another count of its graph, in which the 18 states of its convolutions are copied."""
    qwen3_5 = pytest.importorskip("mlx_lm.models.qwen3_5")
    config = config_of("0.8B", tmp_path)
    peer = qwen3_5.Model(qwen3_5.ModelArgs.from_dict(json.loads((tmp_path / "config.json").read_text())))
    peer.set_dtype(mx.bfloat16)
    nn.quantize(peer, 64, 4)
    assert 590 < count_peer_step(peer, config.text).total() < 620


def constant(*shape: int) -> mx.array:
    x = mx.ones(shape)
    mx.eval(x)
    return x


@pytest.mark.parametrize(
    ("outputs", "counts"),
    [
        pytest.param(lambda x: [x.reshape(2, 8).T[1:]], {}, id="views_are_none"),
        pytest.param(lambda x: [x @ x, x + 1], {"matmul": 1, "Add": 1}, id="two_outputs"),
        pytest.param(lambda x: [mx.concatenate([x, x[:1], x[1:]])], {"Concatenate": 3}, id="a_copy_for_each_part"),
        pytest.param(lambda x: [mx.exp(y := x @ x), mx.abs(y)], {"matmul": 1, "Exp": 1, "Abs": 1}, id="shared_once"),
        pytest.param(
            lambda x: [mx.slice_update(x, x[:1], mx.array(1), axes=(0,))],
            {"write of keys and values": 2},
            id="the_address_and_the_copy",
        ),
        pytest.param(lambda x: [mx.contiguous(x[1:])], {}, id="contiguous_already"),
        pytest.param(
            lambda x: [mx.compile(lambda y: mx.exp(y) * 2 + y)(x)], {"fused elementwise": 1}, id="fused_elementwise"
        ),
    ],
)
def test_counting(outputs: object, counts: dict[str, int]) -> None:
    assert launches(outputs(constant(4, 4))) == counts  # type: ignore[operator]


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    command.main(["demo"])
    *table, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert found["qwen_mlx"]["step"]["total"] < found["mlx-lm"]["step"]["total"] / 2
    assert found["layers"] == 8
    assert any(line.split() == ["total", "9", "27"] for line in table)


def one(*shape: int, dtype: mx.Dtype = mx.bfloat16) -> mx.array:
    x = mx.ones(shape, dtype)
    mx.eval(x)
    return x


@pytest.mark.parametrize(
    ("compute", "counts"),
    [
        pytest.param(lambda: mx.fast.rms_norm(one(4, 8), one(8), 1e-6), {"norm": 1}, id="norm"),
        pytest.param(
            lambda: mx.fast.rms_norm(one(4, 8), one(8, dtype=mx.float32), 1e-6),
            {"norm": 1, "AsType": 1},
            id="norm_with_a_wider_gain",
        ),
        pytest.param(
            lambda: mx.fast.scaled_dot_product_attention(
                one(1, 2, 1, 8), -one(1, 2, 4, 8), one(1, 2, 4, 8), scale=1.0, mask=one(1, 1, 1, 4) > 0
            ),
            {"attention": 1, "Negative": 1, "Greater": 1},
            id="attention_after_its_keys_and_mask",
        ),
        pytest.param(
            lambda: mx.dequantize(one(4, 8, dtype=mx.uint32), one(4, 1), one(4, 1)),
            {"dequantized rows": 1},
            id="dequantized_rows",
        ),
        pytest.param(
            lambda: add_rms_norm(one(4, 8), one(4, 8), one(8, dtype=mx.float32), 1e-6), {"own kernel": 1}, id="kernel"
        ),
    ],
)
def test_what_stands_for_one_launch(compute: Callable[[], Any], counts: dict[str, int]) -> None:
    with stand_ins():
        results = compute()
    assert launches([results] if isinstance(results, mx.array) else results) == counts


def test_counting_leaves_nothing_replaced(tmp_path: Path) -> None:
    """Functions that the stand-ins replace are MLX's own again."""
    before = mx.fast.rms_norm, mx.fast.rope, mx.fast.scaled_dot_product_attention, mx.dequantize
    model = model_of("0.8B", tmp_path, None)
    layers = model.model.layers
    count_step(model, [0, 3])
    assert (mx.fast.rms_norm, mx.fast.rope, mx.fast.scaled_dot_product_attention, mx.dequantize) == before
    assert model.model.layers is layers
