"""YaRN against transformers: frequencies, attention factors, and logits at four times the native length."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from qwen_mlx.config import parse_config
from qwen_mlx.load import load_model
from qwen_mlx.model.qwen import Qwen
from qwen_mlx.model.rope import RotaryEmbedding
from tests.golden.checkpoints import VARIANTS as SIZES
from tests.golden.checkpoints import build, config
from tests.golden.compare import TOLERANCE
from tests.golden.yarn import LENGTH, SETTINGS, VARIANTS, rope_parameters, with_yarn
from tests.metal_emulator.device import emulated_metal
from tests.metal_emulator.recording import recording

GOLDEN = dict(np.load(Path(__file__).parents[1] / "golden" / "yarn.npz"))
every_setting = pytest.mark.parametrize("name", SETTINGS)


def rope(parameters: dict[str, Any]) -> RotaryEmbedding:
    """In the head size of the released models."""
    raw = config(SIZES["c-r3-d128"])
    raw["text_config"]["rope_parameters"] = parameters
    text = parse_config(raw, {}, Path("nowhere")).text
    return RotaryEmbedding(text.rotary_dim, text.rope_parameters)


@pytest.fixture(scope="module")
def yarn_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Qwen]:
    models: dict[str, Qwen] = {}

    def model(variant: str) -> Qwen:
        if variant not in models:
            folder = build(variant, tmp_path_factory.mktemp(variant))
            raw = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(with_yarn(raw)))
            models[variant] = load_model(folder, dtype="float32")
        return models[variant]

    return model


def error(variant: str, logits: mx.array) -> float:
    """Largest difference to the golden logits: every eighth row's columns, and the last row."""
    rows, last = np.array(logits)[::8][:, GOLDEN["columns"]], np.array(logits)[-1]
    return max(np.abs(rows - GOLDEN[f"{variant}_columns"]).max(), np.abs(last - GOLDEN[f"{variant}_last"]).max())


def golden_prompt(variant: str) -> mx.array:
    return mx.array(GOLDEN[f"{variant}_ids"])[None]


@every_setting
def test_frequencies_are_those_of_transformers(name: str) -> None:
    ours = np.array(rope(rope_parameters(SETTINGS[name])).frequencies)
    assert np.abs(ours / GOLDEN[f"{name}_frequencies"] - 1).max() < 1e-6


@every_setting
def test_the_attention_factor_is_that_of_transformers(name: str) -> None:
    assert rope(rope_parameters(SETTINGS[name])).scale == pytest.approx(float(GOLDEN[f"{name}_factor"]), rel=1e-7)


@every_setting
def test_both_forms_turn_a_head_alike(name: str) -> None:
    """Text and three equal axes; a whole turn is 2 pi, so an angle of 400 is rounded by some 1e-5."""
    embedding = rope(rope_parameters(SETTINGS[name]))
    x = mx.array(np.random.RandomState(0).standard_normal((2, 3, 40, 256)), mx.float32)
    positions = mx.broadcast_to(mx.arange(400, 440), (3, 2, 40))
    assert mx.abs(embedding(x, 400) - embedding(x, 0, positions)).max() < 2e-4


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_at_four_times_the_native_length(variant: str, yarn_model: Callable[[str], Qwen]) -> None:
    assert golden_prompt(variant).size == 4 * LENGTH
    assert error(variant, yarn_model(variant)(golden_prompt(variant))[0]) < TOLERANCE


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_in_pieces(variant: str, yarn_model: Callable[[str], Qwen]) -> None:
    model, tokens = yarn_model(variant), golden_prompt(variant)
    cache = model.make_cache()
    pieces = [model(piece, cache) for piece in mx.split(tokens, [100, 101, 102, 230], axis=1)]
    assert error(variant, mx.concatenate(pieces, axis=1)[0]) < TOLERANCE


def test_the_model_without_yarn_is_far_off(model_of: Callable[[str, str], Qwen]) -> None:
    assert GOLDEN["c-r3-d128_effect"] > 1000 * TOLERANCE
    assert error("c-r3-d128", model_of("c-r3-d128", "float32")(golden_prompt("c-r3-d128"))[0]) > 100 * TOLERANCE


def test_logits_through_the_kernel(yarn_model: Callable[[str], Qwen]) -> None:
    """The prompt in chunks, on the variant whose heads the kernel serves."""
    model, tokens = yarn_model("c-r3-d128"), golden_prompt("c-r3-d128")
    with emulated_metal(), recording() as runs:
        cache = model.make_cache()
        pieces = [model(piece, cache) for piece in mx.split(tokens, 4, axis=1)]
        mx.eval(pieces)
    assert "qwen_qk_norm_rope" in {run.name for run in runs}
    assert error("c-r3-d128", mx.concatenate(pieces, axis=1)[0]) < TOLERANCE


def test_the_context_is_as_long_as_the_factor_says() -> None:
    raw = config(SIZES["c-r3-d128"])
    assert parse_config(raw, {}, Path("nowhere")).text.context_length == 4096
    raw["text_config"]["rope_parameters"] |= {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 4096,
    }
    assert parse_config(raw, {}, Path("nowhere")).text.context_length == 4 * 4096
