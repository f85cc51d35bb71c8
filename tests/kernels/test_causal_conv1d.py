"""The causal convolution against float64: window boundaries, carried columns, padding on either side."""

import mlx.core as mx
import numpy as np
import pytest

from qwen_mlx.kernels.causal_conv1d import causal_conv1d, naive_causal_conv1d, silu

# Largest error over largest reference value, by the dtype the result is rounded to.
TOLERANCE = {mx.float32: 1e-6, mx.float16: 1e-3, mx.bfloat16: 5e-3}

FORMS = pytest.mark.parametrize("convolve", [causal_conv1d, naive_causal_conv1d])


def problem(T, *, B=2, Cn=24, K=4, dtype=mx.float32):
    rng = np.random.default_rng(T)
    shapes = (B, T, Cn), (Cn, K), (B, K - 1, Cn)
    return [mx.array(rng.standard_normal(shape).astype(np.float32)).astype(dtype) for shape in shapes]


def float64(x):
    return np.array(x.astype(mx.float32), np.float64)


def float64_conv(x, weight, conv_state):
    """silu(sum_i w_i x_{t-K+1+i}) in NumPy, and the last K-1 columns."""
    x, weight, conv_state = (float64(a) for a in (x, weight, conv_state))
    T, K = x.shape[1], weight.shape[1]
    columns = np.concatenate([conv_state, x], axis=1)
    z = np.stack([np.einsum("bic,ci->bc", columns[:, t : t + K], weight) for t in range(T)], axis=1)
    return z / (1 + np.exp(-z)), columns[:, T:]


def error(y, reference):
    ratio = np.abs(float64(y) - reference).max() / np.abs(reference).max()
    return ratio if np.isfinite(ratio) else np.inf


@FORMS
@pytest.mark.parametrize("K", [2, 3, 4])
@pytest.mark.parametrize(
    "T",
    [
        pytest.param(1, id="one_token"),
        pytest.param(2, id="shorter_than_the_window"),
        pytest.param(3, id="as_long_as_the_state"),
        pytest.param(4, id="as_long_as_the_window"),
        pytest.param(65, id="longer"),
    ],
)
def test_equals_float64(T, K, convolve):
    inputs = problem(T, K=K)
    y, conv_state = convolve(*inputs)
    expected, columns = float64_conv(*inputs)
    assert error(y, expected) < TOLERANCE[mx.float32]
    assert np.array_equal(float64(conv_state), columns)


@FORMS
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_rounds_once_to_the_dtype_of_x(dtype, convolve):
    inputs = problem(9, dtype=dtype)
    y, conv_state = convolve(*inputs)
    assert (y.dtype, conv_state.dtype) == (dtype, dtype)
    assert error(y, float64_conv(*inputs)[0]) < TOLERANCE[dtype]


def test_float32_taps_and_state_do_not_widen_the_result():
    x, weight, conv_state = problem(5)
    y, columns = causal_conv1d(x.astype(mx.bfloat16), weight, conv_state)
    assert (y.dtype, columns.dtype) == (mx.bfloat16, mx.bfloat16)


def test_sum_is_float32_for_16_bit_inputs():
    """256 + 1 is 256 in bfloat16; the taps take the 256 away again."""
    x = mx.array([1.0, 256.0, -256.0, 0.0], dtype=mx.bfloat16).reshape(1, 4, 1)
    y, _ = causal_conv1d(x, mx.ones((1, 4), dtype=mx.bfloat16), mx.zeros((1, 3, 1), dtype=mx.bfloat16))
    assert y[0, 3, 0].item() == pytest.approx(1 / (1 + np.exp(-1)), rel=4e-3)


@pytest.mark.parametrize("lengths", [[1] * 12, [11, 1], [1, 2, 9], [3, 4, 5]], ids=str)
def test_pieces_equal_the_whole_to_the_last_bit(lengths):
    x, weight, conv_state = problem(12)
    whole, last = causal_conv1d(x, weight, conv_state)
    pieces, start = [], 0
    for length in lengths:
        y, conv_state = causal_conv1d(x[:, start : start + length], weight, conv_state)
        pieces.append(y)
        start += length
    assert np.array_equal(float64(mx.concatenate(pieces, axis=1)), float64(whole))
    assert np.array_equal(float64(conv_state), float64(last))


@FORMS
@pytest.mark.parametrize(("pad", "T"), [(1, 1), (2, 9), (9, 2)])
def test_left_padded_row_equals_the_unpadded_one(pad, T, convolve):
    x, weight, conv_state = problem(pad + T)
    conv_state = mx.zeros_like(conv_state)
    mask = mx.array(np.stack([np.arange(pad + T) >= pad, np.ones(pad + T, bool)]))
    y, columns = convolve(x, weight, conv_state, mask=mask)
    expected, expected_columns = float64_conv(x[:1, pad:], weight, conv_state[:1])
    assert error(y[:1, pad:], expected) < TOLERANCE[mx.float32]
    assert np.array_equal(float64(columns[:1]), expected_columns)
    assert error(y[1:], float64_conv(x[1:], weight, conv_state[1:])[0]) < TOLERANCE[mx.float32]


@FORMS
@pytest.mark.parametrize("ends", [(0, 6), (1, 2), (5, 6)], ids=str)
def test_right_padding_keeps_the_columns_of_the_last_real_token(ends, convolve):
    x, weight, conv_state = problem(6)
    _, columns = convolve(x, weight, conv_state, mask=mx.arange(6)[None] < mx.array(ends)[:, None])
    expected = [float64(mx.concatenate([conv_state[b], x[b, :end]])[-3:]) for b, end in enumerate(ends)]
    assert np.array_equal(float64(columns), np.stack(expected))


def test_silu_is_exact_in_both_tails():
    x = mx.array(np.linspace(-200, 200, 4001), dtype=mx.float32)
    z = float64(x)
    expected = z / (1 + np.exp(-z))
    assert np.abs(float64(silu(x)) - expected).max() < 1e-5
    near = np.abs(z) < 14
    assert np.allclose(float64(silu(x))[near], expected[near], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((4, 8), (8, 4), (1, 3, 8)), r"x has shape \(4, 8\); it must be \[B, T, Cn\]"),
        (((1, 0, 8), (8, 4), (1, 3, 8)), r"x has shape \(1, 0, 8\): no token"),
        (((1, 4, 8), (8, 1, 4), (1, 3, 8)), r"weight has shape \(8, 1, 4\); it must be \[Cn, K\]"),
        (((1, 4, 8), (4, 8), (1, 7, 8)), r"weight has shape \(4, 8\); beside x \(1, 4, 8\) it must be \(8, K\)"),
        (((1, 4, 8), (8, 4), (1, 4, 8)), r"conv_state has shape \(1, 4, 8\); .* it must be \(1, 3, 8\)"),
        (((1, 4, 8), (8, 4), (2, 3, 8)), r"conv_state has shape \(2, 3, 8\); .* it must be \(1, 3, 8\)"),
    ],
)
def test_wrong_argument_is_named_with_both_shapes(shapes, message):
    with pytest.raises(ValueError, match=message):
        causal_conv1d(*(mx.zeros(shape) for shape in shapes))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (mx.ones((2, 3), dtype=mx.bool_), r"mask has shape \(2, 3\); .* it must be \(2, 4\)"),
        (mx.ones((2, 4)), "mask has dtype mlx.core.float32; it must be bool"),
    ],
    ids=["shape", "dtype"],
)
def test_wrong_mask_is_named(mask, message):
    with pytest.raises(ValueError, match=message):
        causal_conv1d(*problem(4), mask=mask)
