"""Kernels that others wrote and that run on Macs: the emulator must take them as they are and find nothing.

MLX's gated_delta_update.h and its steel matrix product, and mlx-lm's gated delta kernels, against sums in float64.
"""

import ctypes
import importlib
import struct
import sys

import mlx.core as mx
import numpy as np
import pytest

from tests import metal_emulator
from tests.metal_emulator import MetalEmulatorError
from tests.metal_emulator.raw import Input, Output, run_header_kernel
from tests.metal_emulator.signature import TYPE_NAMES


@pytest.fixture(autouse=True)
def emulator():
    metal_emulator.require()


DTYPES = [mx.float32, mx.float16, mx.bfloat16]
# Largest error over largest reference value, by the dtype the result is rounded to.
TOLERANCE = {mx.float32: 1e-5, mx.float16: 2e-3, mx.bfloat16: 1e-2}


def float64(array):
    return np.array(array.astype(mx.float32), np.float64)


def error(array, reference):
    ratio = np.abs(float64(array) - reference).max() / np.abs(reference).max()
    return ratio if np.isfinite(ratio) else np.inf


def gated_delta_problem(T, *, Dv, dtype, B=1, Hk=2, Hv=4, Dk=128):
    """q, k, v, g, beta in `dtype` and a float32 state [B, Hv, Dv, Dk]."""
    rng = np.random.default_rng(T)

    def normal(*shape):
        return rng.standard_normal(shape)

    def unit(x):
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    q, k, v = unit(normal(B, T, Hk, Dk)) * Dk**-0.5, unit(normal(B, T, Hk, Dk)), normal(B, T, Hv, Dv)
    g, beta = np.exp(-0.5 * rng.random((B, T, Hv))), 1 / (1 + np.exp(-normal(B, T, Hv)))
    inputs = [mx.array(x.astype(np.float32)).astype(dtype) for x in (q, k, v, g, beta)]
    return [*inputs, mx.array((0.1 * normal(B, Hv, Dv, Dk)).astype(np.float32))]


def naive_gated_delta(q, k, v, g, beta, state):
    """S <- g S; S <- S + beta (v - S k) k^T; y = S q, token by token in float64."""
    q, k, v, g, beta, state = map(float64, (q, k, v, g, beta, state))
    q, k = (np.repeat(x, v.shape[2] // x.shape[2], axis=2) for x in (q, k))
    y = np.zeros_like(v)
    for t in range(v.shape[1]):
        state = state * g[:, t, :, None, None]
        delta = beta[:, t, :, None] * (v[:, t] - np.einsum("bhvk,bhk->bhv", state, k[:, t]))
        state = state + delta[..., None] * k[:, t, :, None, :]
        y[:, t] = np.einsum("bhvk,bhk->bhv", state, q[:, t])
    return y, state


def run_mlx_gated_delta(inputs, *, chunked):
    q, k, v, g, beta, state = inputs
    (B, T, Hk, Dk), (Hv, Dv) = q.shape, v.shape[2:]
    pointer = f"const {TYPE_NAMES[q.dtype]}*"
    arguments = [
        *(Input(name, pointer, value) for name, value in (("q", q), ("k", k), ("v", v))),
        Input("state_in", "const float*", state),
        Input("g", pointer, g),
        Input("beta", pointer, beta),
        Output("y", pointer.removeprefix("const "), v.shape, q.dtype),
        Output("state_out", "float*", state.shape, mx.float32),
        Input("T", "int&", mx.array(T)),
    ]
    sizes = f"{TYPE_NAMES[q.dtype]}, {Dk}, {Dv}, {Hk}, {Hv}"
    if chunked:
        instance, rows = f"gated_delta_fused_chunk<{sizes}, 8>", Dv // 8
    else:
        instance, rows = f"gated_delta_seq<{sizes}, 4>", Dv
        # It is written to only when states are saved.
        arguments.append(Output("state_cache", "float*", (1,), mx.float32, init_value=0))
    return run_header_kernel(
        ["gated_delta_update.h"],
        instance,
        arguments,
        attributes=["thread_position_in_grid", "thread_position_in_threadgroup", "thread_index_in_simdgroup"],
        grid=(32, rows, B * Hv),
        threadgroup=(32, 4, 1),
        function_constants={"save_state": (ctypes.c_bool, False)},
    )[:2]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("T", "chunked"),
    [
        pytest.param(9, False, id="sequential"),
        pytest.param(16, True, id="whole_chunks"),
        pytest.param(21, True, id="ragged_last_chunk"),
    ],
)
def test_mlx_gated_delta_equals_float64(T, chunked, dtype):
    inputs = gated_delta_problem(T, Dv=32 if chunked else 16, dtype=dtype)
    y, state = run_mlx_gated_delta(inputs, chunked=chunked)
    expected_y, expected_state = naive_gated_delta(*inputs)
    assert error(y, expected_y) < TOLERANCE[dtype]
    assert error(state, expected_state) < TOLERANCE[mx.float32]


@pytest.fixture(scope="module")
def gated_delta():
    """mlx-lm's module, whose kernels are made when it is imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mx.fast, "metal_kernel", metal_emulator.metal_kernel)
        patch.setattr(mx.metal, "is_available", lambda: True)
        name = "mlx_lm.models.gated_delta"
        patch.delitem(sys.modules, name, raising=False)
        module = importlib.import_module(name)
        # The next importer gets one without the emulator.
        patch.delitem(sys.modules, name)
        yield module


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", ["gated_delta_kernel_unpacked", "gated_delta_kernel_xtree", "gated_delta_kernel"])
def test_mlx_lm_kernel_equals_float64(kernel, dtype, gated_delta):
    inputs = gated_delta_problem(9, Dv=16, dtype=dtype)
    y, state = getattr(gated_delta, kernel)(*inputs)
    expected_y, expected_state = naive_gated_delta(*inputs)
    assert error(y, expected_y) < TOLERANCE[dtype]
    assert error(state, expected_state) < TOLERANCE[mx.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mlx_lm_packed_kernel_equals_its_comparator_to_the_last_bit(dtype, gated_delta):
    inputs = gated_delta_problem(9, Dv=16, dtype=dtype)
    packed, compared = gated_delta.gated_delta_kernel(*inputs), gated_delta.gated_delta_kernel_xtree(*inputs)
    assert all(mx.array_equal(mine, theirs).item() for mine, theirs in zip(packed, compared))


@pytest.mark.parametrize("vectorized", [False, True], ids=["scalar_decay", "vector_decay"])
def test_mlx_lm_masked_kernel_equals_its_operations(vectorized, gated_delta):
    q, k, v, g, beta, state = gated_delta_problem(9, Dv=16, dtype=mx.float32)
    if vectorized:
        g = mx.broadcast_to(g[..., None], (*g.shape, 128)) * 1
    mask = mx.array(np.arange(9)[None] % 3 != 1)
    y, last = gated_delta.gated_delta_kernel(q, k, v, g, beta, state, mask)
    expected_y, expected_last = gated_delta.gated_delta_ops(q, k, v, g, beta, state, mask)
    seen = mask[..., None, None]
    assert error(mx.where(seen, y, 0), float64(mx.where(seen, expected_y, 0))) < TOLERANCE[mx.float32]
    assert error(last, float64(expected_last)) < TOLERANCE[mx.float32]


def steel_gemm_error(*, M, N, K, dtype, edit=str):
    """Of A[M, K] @ B[N, K]^T in tiles of 32 x 32 x 16, with two by two SIMD-groups."""
    tile_m, tile_n, tile_k, groups = 32, 32, 16, 2
    rng = np.random.default_rng(0)
    a, b = (mx.array(rng.standard_normal(shape).astype(np.float32)).astype(dtype) for shape in ((M, K), (N, K)))
    tiles_m, tiles_n = -(-M // tile_m), -(-N // tile_n)
    layout = (M, N, K, K, K, N, tiles_n, tiles_m, M * K, N * K, M * N, 0, K // tile_k, 1)
    parameters = np.frombuffer(struct.pack("<8i3q3i4x", *layout), np.uint8)
    unused, pointer = np.zeros(128, np.uint8), f"const {TYPE_NAMES[dtype]}*"
    constants = {"has_batch": False, "use_out_source": False, "do_axpby": False}
    constants |= {"align_M": M % tile_m == 0, "align_N": N % tile_n == 0, "align_K": K % tile_k == 0}
    (product,) = run_header_kernel(
        ["steel/gemm/gemm.h", "steel/gemm/kernels/steel_gemm_fused.h"],
        f"gemm<{TYPE_NAMES[dtype]}, {tile_m}, {tile_n}, {tile_k}, {groups}, {groups}, false, true, float>",
        [
            Input("A", pointer, a),
            Input("B", pointer, b),
            Input("C", pointer, unused),
            Output("D", pointer.removeprefix("const "), (M, N), dtype),
            Input("params", "const mlx::steel::GEMMParams*", parameters),
            Input("addmm_params", "const mlx::steel::GEMMAddMMParams*", unused),
            Input("batch_shape", "const int*", unused),
            Input("batch_strides", "const int64_t*", unused),
        ],
        attributes=[
            "thread_index_in_simdgroup",
            "simdgroup_index_in_threadgroup",
            "threadgroup_position_in_grid",
            "thread_position_in_threadgroup",
        ],
        grid=(tiles_n * 32, tiles_m * groups, groups),
        threadgroup=(32, groups, groups),
        function_constants={name: (ctypes.c_bool, bool(value)) for name, value in constants.items()},
        edit=edit,
    )
    return error(product, float64(a) @ float64(b).T)


@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [
        pytest.param((64, 64, 64), mx.float32, id="whole_tiles"),
        pytest.param((37, 50, 72), mx.bfloat16, id="ragged_tiles"),
    ],
)
def test_mlx_matrix_product_equals_float64(sizes, dtype):
    M, N, K = sizes
    assert steel_gemm_error(M=M, N=N, K=K, dtype=dtype) < TOLERANCE[dtype]


BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
LOOP = "for (int k = 0; k < gemm_k_iterations; k++) {"


@pytest.mark.parametrize("number", [0, 1], ids=["before_loading_a_tile", "before_multiplying"])
def test_barrier_missing_in_mlx_matrix_product_is_found(number):
    def without_barrier(text):
        before, kernel = text.split("void gemm(")
        pieces = kernel.split(LOOP)
        loop = pieces[1].split(BARRIER)
        pieces[1] = BARRIER.join(loop[: number + 1]) + ";" + BARRIER.join(loop[number + 1 :])
        return f"{before}void gemm({LOOP.join(pieces)}"

    with pytest.raises(MetalEmulatorError) as caught:
        steel_gemm_error(M=64, N=64, K=64, dtype=mx.float32, edit=without_barrier)
    assert "data race (threadgroup memory)" in caught.value.kinds


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mlx_attention_in_threadgroups_of_1024_equals_float64(dtype):
    Hq, Hkv, N, D = 4, 2, 77, 128
    rng = np.random.default_rng(0)
    q, k, v = (mx.array(rng.standard_normal((h, n, D)).astype(np.float32)) for h, n in ((Hq, 1), (Hkv, N), (Hkv, N)))
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    pointer, unused = f"const {TYPE_NAMES[dtype]}*", np.zeros(128, np.uint8)
    sizes = {"gqa_factor": Hq // Hkv, "N": N}
    strides = {"k_head_stride": N * D, "k_seq_stride": D, "v_head_stride": N * D, "v_seq_stride": D}
    absent = {"bmask": "const bool*", "fmask": pointer, "mask_kv_seq_stride": "const int&"}
    absent |= {"mask_q_seq_stride": "const int&", "mask_head_stride": "const int&", "sinks": pointer}
    (out,) = run_header_kernel(
        ["sdpa_vector.h"],
        f"sdpa_vector<{TYPE_NAMES[dtype]}, {D}, {D}>",
        [
            *(Input(name, pointer, value) for name, value in (("queries", q), ("keys", k), ("values", v))),
            Output("out", pointer.removeprefix("const "), (Hq, D), dtype),
            *(Input(name, "const int&", mx.array(size)) for name, size in sizes.items()),
            *(Input(name, "const size_t&", mx.array(stride, mx.uint64)) for name, stride in strides.items()),
            Input("scale", "const float&", mx.array(D**-0.5)),
            *(Input(name, declaration, unused) for name, declaration in absent.items()),
            Input("num_q_heads", "const int&", unused),
        ],
        attributes=[
            "threadgroup_position_in_grid",
            "threadgroups_per_grid",
            "simdgroup_index_in_threadgroup",
            "thread_index_in_simdgroup",
        ],
        grid=(Hq * 1024, 1, 1),
        threadgroup=(1024, 1, 1),
        function_constants={
            name: (ctypes.c_bool, False)
            for name in ("has_mask", "query_transposed", "do_causal", "bool_mask", "float_mask", "has_sinks")
        },
    )
    q, k, v = float64(q)[:, 0], *(np.repeat(float64(x), Hq // Hkv, axis=0) for x in (k, v))
    scores = np.exp(np.einsum("hd,hnd->hn", q, k) * D**-0.5)
    expected = np.einsum("hn,hnd->hd", scores / scores.sum(1, keepdims=True), v)
    assert error(out, expected) < TOLERANCE[dtype]
