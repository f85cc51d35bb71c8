"""The causal convolution against float64: window boundaries, carried columns, padding on either side, head norms."""

from functools import partial

import mlx.core as mx
import numpy as np
import pytest

from qwen_mlx.kernels.activations import silu
from qwen_mlx.kernels.causal_conv1d import causal_conv1d, l2_norm, naive_causal_conv1d
from tests import reference
from tests.kernels.problems import conv_problem as problem
from tests.reference import DTYPES, error, float64, within_tolerance

HEADS = {"key_heads": 2, "key_dim": 32}
FORMS = pytest.mark.parametrize("convolve", [causal_conv1d, naive_causal_conv1d])
LENGTHS = [
    pytest.param(1, id="one_token"),
    pytest.param(2, id="shorter_than_the_window"),
    pytest.param(3, id="as_long_as_the_state"),
    pytest.param(4, id="as_long_as_the_window"),
    pytest.param(7, id="one_below_a_block"),
    pytest.param(8, id="one_block"),
    pytest.param(9, id="one_above_a_block"),
    pytest.param(65, id="longer"),
]


@FORMS
@pytest.mark.parametrize("K", [2, 3, 4])
@pytest.mark.parametrize("T", LENGTHS)
def test_equals_float64(T, K, convolve):
    inputs = problem(T, K=K)
    assert within_tolerance(convolve(*inputs, **HEADS), reference.causal_conv1d(*inputs, **HEADS))


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("K", [2, 4])
@pytest.mark.usefixtures("metal")
def test_the_kernel_equals_float64(T, K):
    inputs = problem(T, K=K)
    assert within_tolerance(causal_conv1d(*inputs, **HEADS), reference.causal_conv1d(*inputs, **HEADS))


@pytest.mark.parametrize(
    ("key_heads", "key_dim", "values"),
    [
        pytest.param(1, 32, 8, id="few_values"),
        pytest.param(3, 64, 64, id="one_full_slot_of_values"),
        pytest.param(2, 96, 200, id="a_ragged_last_slot"),
        pytest.param(2, 128, 128 * 3, id="more_values_than_keys"),
        pytest.param(16, 128, 16 * 128, id="heads_of_0.8B"),
    ],
)
@pytest.mark.usefixtures("anywhere")
def test_every_layout_of_channels(key_heads, key_dim, values):
    heads = {"key_heads": key_heads, "key_dim": key_dim}
    inputs = problem(5, B=1, values=values, **heads)
    assert within_tolerance(causal_conv1d(*inputs, **heads), reference.causal_conv1d(*inputs, **heads))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("anywhere")
def test_results_are_not_rounded_to_the_dtype_of_x(dtype):
    inputs = problem(9, dtype=dtype)
    *results, conv_state = causal_conv1d(*inputs, **HEADS)
    assert {x.dtype for x in results} == {mx.float32}
    assert conv_state.dtype == dtype
    assert within_tolerance([*results, conv_state], reference.causal_conv1d(*inputs, **HEADS))


@pytest.mark.usefixtures("anywhere")
def test_the_columns_kept_are_those_of_x_to_the_last_bit():
    inputs = problem(9, dtype=mx.bfloat16)
    assert np.array_equal(float64(causal_conv1d(*inputs, **HEADS)[3]), float64(inputs[0][:, -3:]))


@pytest.mark.usefixtures("anywhere")
def test_float32_taps_and_state_do_not_widen_the_columns_kept():
    x, weight, conv_state = problem(5)
    assert causal_conv1d(x.astype(mx.bfloat16), weight, conv_state, **HEADS)[3].dtype == mx.bfloat16


@pytest.mark.usefixtures("anywhere")
def test_sum_is_float32_for_16_bit_inputs():
    """256 + 1 is 256 in bfloat16; the taps take the 256 away again."""
    x, weight, conv_state = problem(4, B=1, dtype=mx.bfloat16)
    x[:, :, -1], weight[-1], conv_state[:] = mx.array([1.0, 256.0, -256.0, 0.0]), mx.ones(4), 0
    v = causal_conv1d(x, weight, conv_state, **HEADS)[2]
    assert v[0, 3, -1].item() == pytest.approx(1 / (1 + np.exp(-1)), rel=1e-6)


@pytest.mark.parametrize("lengths", [[1] * 12, [11, 1], [1, 2, 9], [3, 4, 5]], ids=str)
@pytest.mark.usefixtures("anywhere")
def test_pieces_equal_the_whole_to_the_last_bit(lengths):
    x, weight, conv_state = problem(12)
    *whole, last = causal_conv1d(x, weight, conv_state, **HEADS)
    pieces, start = [], 0
    for length in lengths:
        *results, conv_state = causal_conv1d(x[:, start : start + length], weight, conv_state, **HEADS)
        pieces.append(results)
        start += length
    joined = [mx.concatenate(parts, axis=1) for parts in zip(*pieces)]
    assert all(np.array_equal(float64(x), float64(y)) for x, y in zip([*joined, conv_state], [*whole, last]))


def left_padded(convolve, pad, T):
    x, weight, conv_state = problem(pad + T)
    conv_state = mx.zeros_like(conv_state)
    mask = mx.array(np.stack([np.arange(pad + T) >= pad, np.ones(pad + T, bool)]))
    *results, columns = convolve(x, weight, conv_state, **HEADS, mask=mask)
    return (
        [*(y[:1, pad:] for y in results), columns[:1]],
        reference.causal_conv1d(x[:1, pad:], weight, conv_state[:1], **HEADS),
        [*(y[1:] for y in results), columns[1:]],
        reference.causal_conv1d(x[1:], weight, conv_state[1:], **HEADS),
    )


PADS = pytest.mark.parametrize(("pad", "T"), [(1, 1), (2, 9), (9, 2)])


@PADS
@pytest.mark.usefixtures("anywhere")
def test_left_padded_row_equals_the_unpadded_one(pad, T):
    padded, alone, full, expected = left_padded(causal_conv1d, pad, T)
    assert within_tolerance(padded, alone)
    assert within_tolerance(full, expected)


@PADS
def test_naive_left_padded_row_equals_the_unpadded_one(pad, T):
    padded, alone, _, _ = left_padded(naive_causal_conv1d, pad, T)
    assert within_tolerance(padded, alone)


def columns_behind(convolve, ends):
    x, weight, conv_state = problem(6)
    *_, columns = convolve(x, weight, conv_state, **HEADS, mask=mx.arange(6)[None] < mx.array(ends)[:, None])
    expected = [float64(mx.concatenate([conv_state[b], x[b, :end]])[-3:]) for b, end in enumerate(ends)]
    return float64(columns), np.stack(expected)


ENDS = pytest.mark.parametrize("ends", [(0, 6), (1, 2), (5, 6)], ids=str)


@ENDS
@pytest.mark.usefixtures("anywhere")
def test_right_padding_keeps_the_columns_of_the_last_real_token(ends):
    assert np.array_equal(*columns_behind(causal_conv1d, ends))


@ENDS
def test_naive_right_padding_keeps_the_columns_of_the_last_real_token(ends):
    assert np.array_equal(*columns_behind(naive_causal_conv1d, ends))


@pytest.mark.parametrize("scale", [1e-5, 1e-4, 1e-3, 1.0, 100.0])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["float32", "bfloat16"])
def test_l2_norm(scale, dtype):
    """Down to vectors that are shorter than the square root of epsilon: there, epsilon is the result."""
    x = mx.array((scale * np.random.default_rng(0).standard_normal((7, 128))).astype(np.float32)).astype(dtype)
    norms = np.sqrt((float64(x) ** 2).sum(-1, keepdims=True) + 1e-6)
    assert l2_norm(x).dtype == mx.float32
    assert error([l2_norm(x)], [float64(x) / norms]) < 1e-6


@pytest.mark.parametrize("eps", [1e-6, 1e-5 / 128, 0.0], ids=["on_the_mean", "too_large", "none"])
def test_wrong_epsilon_of_the_l2_norm_would_be_noticed(eps):
    x = mx.array((1e-4 * np.random.default_rng(0).standard_normal((7, 128))).astype(np.float32))
    norms = np.sqrt((float64(x) ** 2).sum(-1, keepdims=True) + 1e-6)
    assert error([mx.fast.rms_norm(x, None, eps) * 128**-0.5], [float64(x) / norms]) > 0.3


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 30.0], ids=["epsilon_rules", "small", "large"])
@pytest.mark.usefixtures("anywhere")
def test_head_norms_at_every_length(scale):
    """SiLU halves what is small, so a scale of 1e-6 leaves heads far shorter than the square root of epsilon."""
    x, weight, conv_state = problem(5)
    inputs = x * scale, weight, conv_state * scale
    assert within_tolerance(causal_conv1d(*inputs, **HEADS), reference.causal_conv1d(*inputs, **HEADS))


def test_silu_is_exact_in_both_tails():
    x = mx.array(np.linspace(-200, 200, 4001), dtype=mx.float32)
    z = float64(x)
    expected = reference.silu(z)
    assert np.abs(float64(silu(x)) - expected).max() < 1e-5
    near = np.abs(z) < 14
    assert np.allclose(float64(silu(x))[near], expected[near], rtol=1e-6, atol=0)


@pytest.mark.usefixtures("metal")
def test_silu_of_the_kernel_is_exact_in_both_tails():
    z = np.linspace(-200, 200, 401).astype(np.float32)
    x = mx.zeros((401, 1, 72))
    x[:, 0, -1] = mx.array(z)
    weight = mx.zeros((72, 2))
    weight[:, 1] = 1
    v = causal_conv1d(x, weight, mx.zeros((401, 1, 72)), key_heads=1, key_dim=32)[2]
    assert error([v[:, 0, -1]], [reference.silu(z.astype(np.float64))]) < 1e-6


convolve_one_key_head = partial(causal_conv1d, key_heads=1, key_dim=2)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((4, 8), (8, 4), (1, 3, 8)), r"x has shape \(4, 8\); it must be \[B, T, Cn\]"),
        (((1, 0, 8), (8, 4), (1, 3, 8)), r"x has shape \(1, 0, 8\): no token"),
        (((1, 4, 4), (4, 4), (1, 3, 4)), r"x has shape \(1, 4, 4\); queries and keys alone take 4 channels"),
        (((1, 4, 8), (8, 1, 4), (1, 3, 8)), r"weight has shape \(8, 1, 4\); it must be \[Cn, K\]"),
        (((1, 4, 8), (4, 8), (1, 7, 8)), r"weight has shape \(4, 8\); beside x \(1, 4, 8\) it must be \(8, K\)"),
        (((1, 4, 8), (8, 4), (1, 4, 8)), r"conv_state has shape \(1, 4, 8\); .* it must be \(1, 3, 8\)"),
        (((1, 4, 8), (8, 4), (2, 3, 8)), r"conv_state has shape \(2, 3, 8\); .* it must be \(1, 3, 8\)"),
    ],
)
def test_wrong_argument_is_named_with_both_shapes(shapes, message):
    with pytest.raises(ValueError, match=message):
        convolve_one_key_head(*(mx.zeros(shape) for shape in shapes))


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
        causal_conv1d(*problem(4), **HEADS, mask=mask)
