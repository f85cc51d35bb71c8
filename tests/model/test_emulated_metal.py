"""The whole model with its Metal kernels on the emulated device: golden logits, plain MLX's logits, launches."""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from qwen_mlx.bench.launch_count import launches, stand_ins
from qwen_mlx.cache.recurrent import RecurrentCache
from qwen_mlx.kernels.self_check import check_kernels
from qwen_mlx.load import load_model
from qwen_mlx.model.qwen import Qwen
from tests.golden.checkpoints import VARIANTS
from tests.golden.compare import TOLERANCE, difference, load, logits_difference
from tests.kernels.conftest import FREEDOMS
from tests.metal_emulator import recording
from tests.metal_emulator.device import emulated_metal
from tests.model.test_golden import batch_difference, batch_logits, greedy_difference, greedy_logits, prompt_logits

Golden = dict[str, np.ndarray]
SAME = 1e-4
"""Two orders of the same float32 sums; logits go up to 28."""


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def golden(variant: str) -> Golden:
    return load(variant)


@pytest.fixture
def model(variant: str, model_of: Callable[[str, str], Qwen]) -> Qwen:
    return model_of(variant, "float32")


@pytest.fixture(params=sorted(FREEDOMS.keys() - {"metal"}))  # there, the logits are those of plain MLX, below
def metal(request: pytest.FixtureRequest) -> Iterator[None]:
    with emulated_metal(**FREEDOMS[request.param]):
        yield


@pytest.mark.usefixtures("metal")
def test_prefill_gives_the_golden_logits(model: Qwen, golden: Golden) -> None:
    assert logits_difference(golden, 65, prompt_logits(model, golden, 65)) < TOLERANCE


@pytest.mark.usefixtures("metal")
def test_decode_gives_the_golden_tokens_and_logits(model: Qwen, golden: Golden) -> None:
    logits = greedy_logits(model, golden, 5)
    assert logits.argmax(-1).tolist() == golden["greedy_5_tokens"].tolist()
    assert greedy_difference(golden, 5, logits) < TOLERANCE


@pytest.mark.usefixtures("metal")
def test_a_batch_padded_on_the_left_gives_the_golden_tokens_and_logits(model: Qwen, golden: Golden) -> None:
    logits = batch_logits(model, golden)
    assert logits.argmax(-1).tolist() == golden["batch_tokens"].tolist()
    assert batch_difference(golden, logits) < TOLERANCE


def test_logits_are_those_of_plain_mlx(model: Qwen, golden: Golden) -> None:
    plain = prompt_logits(model, golden, 65), greedy_logits(model, golden, 5), batch_logits(model, golden)
    with emulated_metal(fma=True):
        metal = prompt_logits(model, golden, 65), greedy_logits(model, golden, 5), batch_logits(model, golden)
    assert max(difference(x, y) for x, y in zip(metal, plain)) < SAME


def linear_layers(model: Qwen) -> int:
    return sum(isinstance(layer, RecurrentCache) for layer in model.make_cache().layers)


@pytest.mark.parametrize(
    ("T", "kernels"),
    [
        pytest.param(1, ["gated_delta_step"], id="decode"),
        pytest.param(8, ["causal_conv1d", "gated_delta_scan_tape"], id="verify"),
        pytest.param(17, ["causal_conv1d", "gated_delta_chunk"], id="prefill"),
    ],
)
def test_kernels_of_a_layer(T: int, kernels: list[str], model_of: Callable[[str, str], Qwen]) -> None:
    model = model_of("b-r2-d64", "float32")
    with emulated_metal(), recording() as runs:
        mx.eval(model(mx.zeros((1, T), dtype=mx.int32)))
    names = Counter(run.name for run in runs if run.name != "qwen_add_rms_norm")
    assert names == {f"qwen_{kernel}": linear_layers(model) for kernel in kernels}


def test_every_sum_and_its_norm_is_one_launch(model_of: Callable[[str, str], Qwen]) -> None:
    model = model_of("b-r2-d64", "float32")
    with emulated_metal(), recording() as runs:
        mx.eval(model(mx.zeros((1, 1), dtype=mx.int32)))
    assert Counter(run.name for run in runs)["qwen_add_rms_norm"] == 2 * model.config.text.num_hidden_layers


def test_the_mixer_of_a_decoded_token_is_one_launch_besides_its_matmuls(model_of: Callable[[str, str], Qwen]) -> None:
    model = model_of("b-r2-d64", "bfloat16")
    mixer, cache = model.model.layers[0].linear_attn, model.make_cache().layers[0]
    x = mx.random.normal((1, 1, model.config.text.hidden_size)).astype(mx.bfloat16)
    mixer(x, cache, None)  # leaves states behind, as a prompt would
    mx.eval(cache.arrays, mixer.parameters(), x)
    with stand_ins():
        y = mixer(x, cache, None)
    assert launches([y, *cache.arrays]) == {"matmul": 5, "own kernel": 1}


def test_loading_checks_the_kernels_in_the_sizes_of_the_model(checkpoint_of: Callable[[str], Path]) -> None:
    check_kernels.cache_clear()
    with emulated_metal(), recording() as runs:
        load_model(checkpoint_of("e-k64-v32"), dtype="bfloat16")
    check_kernels.cache_clear()
    assert {run.name: re.findall(r"decltype\(\w+<(.*)>\)", run.text) for run in runs} == {
        "qwen_add_rms_norm": ["bfloat16_t, 128, 8"],
        "qwen_causal_conv1d": ["bfloat16_t, 2, 64, 4, 8"],
        "qwen_gated_delta_step": ["bfloat16_t, 64, 32, 4, 448, 6"],
        "qwen_gated_delta_scan": ["float, 64"],
        "qwen_gated_delta_scan_tape": ["float, 64"],
        "qwen_gated_delta_replay": ["float, 64"],
        "qwen_gated_delta_chunk": ["64"],
    }
