"""The check of the kernels at load: silent where they are right, one warning and plain MLX where one is not."""

import warnings
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from qwen_mlx.kernels import backend, self_check
from qwen_mlx.kernels.backend import Kernel
from qwen_mlx.kernels.gated_delta import gated_delta_rule
from qwen_mlx.kernels.gated_delta_replay import gated_delta_replay
from qwen_mlx.kernels.gated_delta_scan import gated_delta_scan
from qwen_mlx.kernels.gated_delta_step import STEP
from qwen_mlx.kernels.random_inputs import AttentionSizes, Sizes
from qwen_mlx.kernels.self_check import DELTA_CHECKS, check_kernels
from tests import reference
from tests.kernels.problems import problem
from tests.metal_emulator import recording
from tests.metal_emulator.device import emulated_metal

SIZES = Sizes(key_heads=2, value_heads=4, key_dim=32, value_dim=16, taps=4, dtype=mx.float32)
ATTENTION = AttentionSizes(hidden_size=96, query_heads=2, kv_heads=1, head_dim=64, rotary_dim=64, dtype=mx.float32)
LABELS = [
    "add_rms_norm",
    "causal_conv1d",
    "gated_delta_step",
    *(kernel.label for kernel in DELTA_CHECKS),
    "qk_norm_rope",
]

# A mistake in each text that its own layout forgives: only the numbers are wrong.
BUGS = {
    "causal_conv1d": ("1.0f + metal::exp(-sum)", "1.1f + metal::exp(-sum)"),
    "gated_delta_step": ("* gain[i] *", "*"),
    "add_rms_norm": ("sum / D + eps", "sum + eps"),
    "qk_norm_rope": ("left * cosine - right * sine", "left * cosine + right * sine"),
    "gated_delta_scan": ("S[i] = S[i] * alpha;", "S[i] = S[i] * alpha * 1.01f;"),
    "gated_delta_replay": ("S[i] = S[i] * alpha;", "S[i] = S[i];"),
    "gated_delta_chunk": ("product *= alphas[t];", "product *= 1.0f;"),
}


@pytest.fixture
def device():
    check_kernels.cache_clear()
    with emulated_metal():
        yield
    check_kernels.cache_clear()


def plant(monkeypatch, name, old, new):
    """Metal's compiler, it seems, makes `new` of `old` in the kernel `name`."""
    source = backend.source

    def changed(asked):
        text = source(asked)
        if asked == name:
            assert old in text
            return text.replace(old, new)
        return text

    monkeypatch.setattr(backend, "source", changed)


@pytest.mark.parametrize("dtype", reference.DTYPES, ids=str)
@pytest.mark.usefixtures("device")
def test_right_kernels_are_trusted_in_silence(dtype):
    with recording() as runs:
        check_kernels(replace(SIZES, dtype=dtype), replace(ATTENTION, dtype=dtype))
    assert backend.distrusted == set()
    assert [run.name for run in runs] == [f"qwen_{label}" for label in LABELS]


@pytest.mark.parametrize("name", BUGS)
@pytest.mark.usefixtures("device")
def test_a_wrong_kernel_is_warned_of_once_and_not_used(name, monkeypatch):
    plant(monkeypatch, name, *BUGS[name])
    with pytest.warns(UserWarning, match=rf"wrong on this GPU .*: {name}") as caught:
        check_kernels(SIZES, ATTENTION)
    check_kernels(SIZES, ATTENTION)  # a second warning would be an error
    assert len(caught) == 1
    assert backend.distrusted == {label for label in LABELS if label.startswith(name)}


@pytest.mark.usefixtures("device")
def test_a_second_model_is_not_warned_of_the_same_kernel(monkeypatch):
    plant(monkeypatch, "gated_delta_chunk", *BUGS["gated_delta_chunk"])
    with pytest.warns(UserWarning, match="gated_delta_chunk"):
        check_kernels(SIZES, ATTENTION)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_kernels(replace(SIZES, value_dim=8), ATTENTION)


@pytest.mark.parametrize(
    "broken", ["S[i] = S[i] +;", "*o_t = 0.0f / 0.0f * read;"], ids=["does_not_compile", "gives_nan"]
)
@pytest.mark.usefixtures("device")
def test_a_kernel_that_does_not_run_is_a_wrong_one(broken, monkeypatch):
    plant(monkeypatch, "gated_delta_scan", "*o_t = read;", broken)
    with pytest.warns(UserWarning, match="gated_delta_scan, gated_delta_scan_tape"):
        check_kernels(SIZES, ATTENTION)


@pytest.mark.usefixtures("device")
def test_a_kernel_that_mlx_refuses_to_launch_is_a_wrong_one(monkeypatch):
    """It throws std::invalid_argument where a pipeline of many registers allows fewer threads than are asked for."""
    launch = Kernel.__call__

    def refuse(kernel, *inputs, **options):
        if kernel is STEP:
            raise ValueError("[metal::Device] Threadgroup size (256) is greater than the maximum (192)")
        return launch(kernel, *inputs, **options)

    monkeypatch.setattr(Kernel, "__call__", refuse)
    with pytest.warns(UserWarning, match="gated_delta_step"):
        check_kernels(SIZES, ATTENTION)
    assert backend.distrusted == {"gated_delta_step"}


@pytest.mark.parametrize("T", [4, 20])
@pytest.mark.usefixtures("device")
def test_answers_stay_right_with_a_wrong_kernel(T, monkeypatch):
    for name in ("gated_delta_scan", "gated_delta_chunk"):
        plant(monkeypatch, name, *BUGS[name])
    with pytest.warns(UserWarning, match="gated_delta_scan, .*gated_delta_chunk"):
        check_kernels(SIZES, ATTENTION)
    inputs = problem(T)
    with recording() as runs:
        results = gated_delta_rule(*inputs)
    assert reference.within_tolerance(results, reference.gated_delta_rule(*inputs))
    assert runs == []


@pytest.mark.usefixtures("device")
def test_prefill_falls_to_the_scan_when_only_the_chunked_kernel_is_wrong(monkeypatch):
    plant(monkeypatch, "gated_delta_chunk", *BUGS["gated_delta_chunk"])
    with pytest.warns(UserWarning, match="gated_delta_chunk"):
        check_kernels(SIZES, ATTENTION)
    inputs = problem(20)
    with recording() as runs:
        gated_delta_rule(*inputs)
    assert [run.name for run in runs] == ["qwen_gated_delta_scan"]


@pytest.mark.parametrize("name", ["gated_delta_scan", "gated_delta_replay"])
@pytest.mark.usefixtures("device")
def test_a_tape_is_written_and_replayed_by_kernels_or_by_neither(name, monkeypatch):
    """They round as one: a tape of the kernel, replayed in plain MLX, would not end in the same bits."""
    plant(monkeypatch, name, *BUGS[name])
    with pytest.warns(UserWarning, match=name):
        check_kernels(SIZES, ATTENTION)
    *tokens, state = problem(6)
    with recording() as runs:
        tape = gated_delta_scan(*tokens, state)[2]
        replayed = gated_delta_replay(state, tape, 4)
        stopped = gated_delta_scan(*(x[:, :4] for x in tokens), state)[1]
    assert runs == []
    assert np.array_equal(np.array(replayed), np.array(stopped))


@pytest.mark.parametrize(
    ("other", "checked"),
    [
        pytest.param({"key_dim": 48}, ["add_rms_norm"], id="no_kernel_of_these_heads"),
        pytest.param({"value_dim": 12}, ["add_rms_norm", "causal_conv1d"], id="values_only_the_convolution_takes"),
        pytest.param({"value_heads": 16}, ["add_rms_norm", "causal_conv1d"], id="eight_values_a_key"),
        pytest.param({"value_heads": 5}, ["add_rms_norm", "causal_conv1d"], id="no_multiple_of_the_keys"),
        pytest.param(
            {"taps": 1},
            ["add_rms_norm", *(kernel.label for kernel in DELTA_CHECKS)],
            id="no_convolution",
        ),
    ],
)
@pytest.mark.usefixtures("device")
def test_only_what_serves_the_sizes_is_checked(other, checked):
    with recording() as runs:
        check_kernels(replace(SIZES, **other), replace(ATTENTION, rotary_dim=16))
    assert [run.name for run in runs] == [f"qwen_{label}" for label in checked]


def test_without_metal_nothing_is_run(monkeypatch):
    check_kernels.cache_clear()
    monkeypatch.setattr(self_check, "trouble", lambda *_: pytest.fail("a kernel was run"))
    check_kernels(SIZES, ATTENTION)
