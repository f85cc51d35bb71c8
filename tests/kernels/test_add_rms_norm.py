"""The sum and its norm against float64: one launch on the emulated device, two operations in plain MLX."""

import mlx.core as mx
import numpy as np
import pytest

from qwen_mlx.kernels.add_rms_norm import add_rms_norm, naive_add_rms_norm
from tests.reference import DTYPES, float64, rms_norm, within_tolerance

EPS = 1e-6


def problem(*shape, dtype=mx.float32, scale=1.0):
    rng = np.random.default_rng(0)
    x, update = (mx.array((scale * rng.standard_normal(shape)).astype(np.float32)).astype(dtype) for _ in range(2))
    return x, update, mx.array(1 + 0.2 * rng.standard_normal(shape[-1]).astype(np.float32)), EPS


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((1, 1, 64), id="fewer_elements_than_threads"),
        pytest.param((2, 3, 255), id="one_thread_idle"),
        pytest.param((1, 2, 256), id="one_element_a_thread"),
        pytest.param((3, 1, 257), id="one_more"),
        pytest.param((1, 1, 1024), id="hidden_size_of_0.8B"),
        pytest.param((1, 1, 5120), id="hidden_size_of_27B"),
        pytest.param((1, 1, 4), id="small_enough_for_constant_memory"),
    ],
)
@pytest.mark.usefixtures("anywhere")
def test_every_shape(shape):
    x, update, gain, eps = problem(*shape)
    total, normed = add_rms_norm(x, update, gain, eps)
    assert within_tolerance((total, normed), (float64(x) + float64(update), rms_norm(float64(total), gain, eps)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("anywhere")
def test_every_dtype(dtype):
    x, update, gain, eps = problem(2, 3, 96, dtype=dtype)
    total, normed = add_rms_norm(x, update, gain, eps)
    assert total.dtype == normed.dtype == dtype
    assert np.array_equal(float64(total), float64(x + update))
    assert within_tolerance([normed], [rms_norm(float64(total), gain, eps)])


@pytest.mark.parametrize("scale", [1e-4, 1e3], ids=["epsilon_counts", "large"])
@pytest.mark.usefixtures("anywhere")
def test_every_size_of_value(scale):
    x, update, gain, eps = problem(2, 96, scale=scale)
    total, normed = add_rms_norm(x, update, gain, eps)
    assert within_tolerance([normed], [rms_norm(float64(total), gain, eps)])


def test_naive():
    x, update, gain, eps = problem(2, 96)
    total, normed = naive_add_rms_norm(x, update, gain, eps)
    assert within_tolerance((total, normed), (float64(x) + float64(update), rms_norm(float64(total), gain, eps)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda update: update[:1], r"update is mlx.core.float32 \(1, 96\) and x mlx.core.float32 \(2, 96\)"),
        (lambda update: update.astype(mx.float16), r"update is mlx.core.float16 \(2, 96\)"),
    ],
    ids=["shape", "dtype"],
)
def test_an_update_of_another_form_is_refused(change, message):
    x, update, gain, eps = problem(2, 96)
    with pytest.raises(ValueError, match=message):
        add_rms_norm(x, change(update), gain, eps)
