"""One decoded token in one launch against float64, and against the separate operations that prefill takes."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from qwen_mlx.kernels.causal_conv1d import causal_conv1d
from qwen_mlx.kernels.gated_delta import gated_delta_rule
from qwen_mlx.kernels.gated_delta_step import gated_delta_step, naive_gated_delta_step, step_is_fused
from tests import reference
from tests.kernels.problems import as_one_matmul_gives_them
from tests.kernels.problems import step_problem as problem
from tests.reference import DTYPES, error, within_tolerance

SIZES = pytest.mark.parametrize(
    "sizes",
    [
        pytest.param({"B": 1, "Hk": 1, "group": 1, "Dv": 8}, id="one_simdgroup_small_inputs_in_constant_memory"),
        pytest.param({"Dk": 64, "Dv": 72}, id="nine_blocks_of_rows_on_eight_simdgroups"),
        pytest.param({"B": 1, "Hk": 1, "Dv": 264}, id="more_values_than_threads"),
        pytest.param({"Dk": 96, "Dv": 40, "group": 3}, id="key_size_96_three_values_a_key"),
        pytest.param({"B": 3, "Dk": 128, "Dv": 16, "group": 4}, id="narrow_values_four_a_key"),
        pytest.param({"B": 1, "Hk": 1, "Dk": 128, "Dv": 128}, id="sizes_of_every_release"),
        pytest.param({"B": 4, "Hk": 1, "group": 1}, id="four_rows"),
        pytest.param({"B": 1, "Hk": 16, "group": 1, "Dv": 8}, id="16_value_heads"),
        pytest.param({"B": 1, "Hk": 16, "group": 3, "Dv": 8}, id="48_value_heads"),
        pytest.param({"K": 2}, id="two_taps"),
    ],
)


@SIZES
@pytest.mark.usefixtures("metal")
def test_every_size(sizes):
    inputs = problem(**sizes)
    assert within_tolerance(gated_delta_step(*inputs), reference.gated_delta_step(*inputs))


@SIZES
def test_naive_every_size(sizes):
    inputs = problem(**sizes)
    assert within_tolerance(naive_gated_delta_step(*inputs), reference.gated_delta_step(*inputs))


@pytest.mark.parametrize("step", [gated_delta_step, naive_gated_delta_step])
@pytest.mark.usefixtures("metal")
def test_what_one_matmul_projected_is_read_as_it_lies(step):
    apart, *rest = problem(B=3)
    joined, starts = as_one_matmul_gives_them(apart)
    for ours, theirs in zip(step(joined, *rest, starts), step(apart, *rest), strict=True):
        assert np.array_equal(np.array(ours), np.array(theirs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("metal")
def test_every_dtype(dtype):
    inputs = problem(dtype=dtype)
    y, conv_state, state = gated_delta_step(*inputs)
    assert (y.dtype, conv_state.dtype, state.dtype) == (dtype, dtype, mx.float32)
    assert within_tolerance((y, conv_state, state), reference.gated_delta_step(*inputs))


@pytest.mark.parametrize("part", ["a", "b", "z"])
@pytest.mark.parametrize("value", [-200.0, -20.0, 0.0, 20.0, 200.0])
@pytest.mark.usefixtures("metal")
def test_gates_shut_and_wide_open(part, value):
    """a: a decay of one and of zero; b: no write and a whole one; z: an output of nothing and of all."""
    projected, *rest = problem()
    changed = {"a": 2, "b": 3, "z": 1}[part]
    projected = tuple(x * 0 + value if i == changed else x for i, x in enumerate(projected))
    y, conv_state, state = gated_delta_step(projected, *rest)
    wanted = reference.gated_delta_step(projected, *rest)
    assert within_tolerance((conv_state, state), wanted[1:])
    # With z far below zero y is next to nothing, and its error counts against the gate at one.
    assert np.abs(reference.float64(y) - wanted[0]).max() < 5e-6 * max(np.abs(wanted[0]).max(), 1)


@pytest.mark.usefixtures("metal")
def test_first_token_of_a_sequence():
    projected, weights, conv_state, state = problem()
    inputs = projected, weights, mx.zeros_like(conv_state), mx.zeros_like(state)
    assert within_tolerance(gated_delta_step(*inputs), reference.gated_delta_step(*inputs))


@pytest.mark.usefixtures("metal")
def test_keys_of_zeros():
    """Their norm is that of epsilon alone; the state decays, and nothing is written."""
    (qkv, *others), weights, conv_state, state = problem()
    inputs = (mx.zeros_like(qkv), *others), weights, mx.zeros_like(conv_state), state
    results, wanted = gated_delta_step(*inputs), reference.gated_delta_step(*inputs)
    assert error(results[2:], wanted[2:]) < reference.TOLERANCE[mx.float32]
    assert np.array_equal(reference.float64(results[0]), wanted[0])


@pytest.mark.usefixtures("metal")
def test_state_is_bit_for_bit_that_of_convolution_and_scan():
    """Where both begin with the same g and beta, decoding a token and verifying it cannot part ways."""
    (qkv, z, a, b), weights, conv_state, state = problem()
    # A decay of one and a strength of one half have the same bits whichever way they are computed.
    projected = qkv, z, mx.full(a.shape, -200.0), mx.zeros(b.shape)
    weights = replace(weights, A_log=mx.zeros((4,)), dt_bias=mx.zeros((4,)))
    _, _, stepped = gated_delta_step(projected, weights, conv_state, state)
    q, k, v, _ = causal_conv1d(qkv, weights.taps, conv_state, key_heads=2, key_dim=32)
    g, beta = mx.zeros((2, 1, 4)), mx.full((2, 1, 4), 0.5)
    _, scanned = gated_delta_rule(q, k, v.reshape(2, 1, 4, 24), g, beta, state)
    assert np.array_equal(np.array(stepped), np.array(scanned))


@pytest.mark.usefixtures("metal")
def test_hundred_tokens_in_a_row_stay_with_float64():
    projected, weights, conv_state, state = problem(B=1, Hk=1, Dv=8)
    ours, exact = (conv_state, state), (conv_state, state)
    for seed in range(100):
        token = tuple(mx.random.normal(x.shape, key=mx.random.key(4 * seed + i)) for i, x in enumerate(projected))
        y, *ours = gated_delta_step(token, weights, *ours)
        wanted, *after = reference.gated_delta_step(token, weights, *exact)
        exact = [mx.array(x.astype(np.float32)) for x in after]
    assert within_tolerance((y, *ours), (wanted, *after))


@pytest.mark.parametrize(
    ("sizes", "fused"),
    [({}, True), ({"Dk": 48}, False), ({"Dv": 12}, False), ({"group": 5}, False)],
    ids=["fits", "key_size_48", "value_size_12", "five_values_a_key"],
)
@pytest.mark.usefixtures("metal")
def test_only_shapes_that_the_kernel_serves_are_fused(sizes, fused):
    _, _, conv_state, state = problem(**sizes)
    assert step_is_fused(conv_state, state) is fused


def test_without_metal_nothing_is_fused():
    assert not step_is_fused(*problem()[2:])
