"""Norm and rotation of queries and keys, and the values with them, against float64 and against MLX's own operations."""

import mlx.core as mx
import numpy as np
import pytest

from qwen_mlx.kernels.qk_norm_rope import HeadNorms, heads_are_fused, naive_qk_norm_rope, qk_norm_rope
from tests import reference
from tests.reference import DTYPES, float64, within_tolerance

THETA = 1e7
EPS = 1e-6


def problem(*, B=2, T=3, Hq=4, Hkv=2, Dh=64, R=64, dtype=mx.float32):
    """q with gates, k, v, and the norms."""
    rng = np.random.default_rng(0)
    shapes = (B, T, Hq, 2 * Dh), (B, T, Hkv, Dh), (B, T, Hkv, Dh)
    projected = [mx.array(rng.standard_normal(shape).astype(np.float32)).astype(dtype) for shape in shapes]
    gains = (mx.array(1 + 0.2 * rng.standard_normal(Dh).astype(np.float32)) for _ in range(2))
    return *projected, HeadNorms(*gains, EPS, mx.array(THETA ** (-2 * np.arange(R // 2) / R), mx.float32))


SIZES = pytest.mark.parametrize(
    "sizes",
    [
        pytest.param({}, id="all_is_rotated"),
        pytest.param({"Dh": 96}, id="a_third_passes_through"),
        pytest.param({"Dh": 256, "B": 1, "T": 1, "Hq": 8}, id="a_token_of_0.8B"),
        pytest.param({"Dh": 160, "R": 128, "Hq": 1, "Hkv": 1}, id="two_pairs_a_lane"),
        pytest.param({"Hq": 3, "Hkv": 2, "T": 5}, id="odd_heads"),
    ],
)


@SIZES
@pytest.mark.usefixtures("metal")
def test_every_size(sizes):
    inputs = problem(**sizes)
    assert within_tolerance(qk_norm_rope(*inputs, 7), reference.qk_norm_rope(*inputs, 7))


@SIZES
def test_naive_every_size(sizes):
    inputs = problem(**sizes)
    assert within_tolerance(naive_qk_norm_rope(*inputs, 7), reference.qk_norm_rope(*inputs, 7))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("metal")
def test_every_dtype(dtype):
    inputs = problem(dtype=dtype)
    results = qk_norm_rope(*inputs, 7)
    assert {x.dtype for x in results} == {dtype}
    assert within_tolerance(results, reference.qk_norm_rope(*inputs, 7))


@pytest.mark.parametrize("offset", [0, 1, 1000, 262_141])
@pytest.mark.usefixtures("metal")
def test_every_place(offset):
    inputs = problem()
    assert within_tolerance(qk_norm_rope(*inputs, offset), reference.qk_norm_rope(*inputs, offset))


@pytest.mark.usefixtures("metal")
def test_an_offset_may_be_an_array():
    inputs = problem()
    pairs = zip(qk_norm_rope(*inputs, mx.array(7)), qk_norm_rope(*inputs, 7))
    assert all(np.array_equal(np.array(x), np.array(y)) for x, y in pairs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("metal")
def test_values_move_bit_by_bit(dtype):
    q, k, v, norms = problem(dtype=dtype)
    _, keys_values = qk_norm_rope(q, k, v, norms, 7)
    assert mx.array_equal(keys_values[1, :], v.transpose(0, 2, 1, 3))


@pytest.mark.usefixtures("metal")
def test_equals_what_the_layer_does_in_plain_mlx():
    q, k, v, norms = problem()
    plain = []
    for x, gain in (q[..., :64], norms.q_gain), (k, norms.k_gain):
        heads = mx.fast.rms_norm(x, gain, EPS).transpose(0, 2, 1, 3)
        plain.append(mx.fast.rope(heads, 64, traditional=False, base=THETA, scale=1.0, offset=7))
    expected = float64(plain[0]), float64(mx.stack([plain[1], v.transpose(0, 2, 1, 3)]))
    assert within_tolerance(qk_norm_rope(q, k, v, norms, 7), expected)


@pytest.mark.usefixtures("metal")
def test_no_notice_is_taken_of_the_gates():
    q, k, v, norms = problem()
    spoiled = mx.concatenate([q[..., :64], q[..., 64:] * mx.nan], axis=-1)
    assert within_tolerance(qk_norm_rope(spoiled, k, v, norms, 7), reference.qk_norm_rope(q, k, v, norms, 7))


@pytest.mark.parametrize(
    ("head_dim", "rotary_dim", "fused"),
    [(256, 64, True), (64, 64, True), (80, 64, False), (64, 16, False), (64, 128, False)],
)
@pytest.mark.usefixtures("metal")
def test_only_heads_that_the_kernel_serves_are_fused(head_dim, rotary_dim, fused):
    assert heads_are_fused(head_dim, rotary_dim) is fused


def test_without_metal_nothing_is_fused():
    assert not heads_are_fused(256, 64)
