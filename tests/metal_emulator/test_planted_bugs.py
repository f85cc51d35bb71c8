"""Forty bugs planted in two kernels that are right: each must be found, and for what it is.

The unspoilt kernels run under every schedule, order of additions and contraction without a finding: a checker that
cries wolf is of no use. The static check stays out of it.
"""

import mlx.core as mx
import numpy as np
import pytest

from tests import metal_emulator
from tests.metal_emulator import MetalCompileError, MetalEmulatorError, metal_kernel
from tests.metal_emulator.launches import MATMUL, ROWSUM


@pytest.fixture(autouse=True)
def emulator():
    metal_emulator.require()
    with metal_emulator.using(static_check=False):
        yield


def random_array(seed, shape, dtype):
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32)).astype(dtype)


def float64(array):
    return np.array(array.astype(mx.float32), np.float64)


def matmul_error(source, *, dtype=mx.float32, threadgroup=(64, 1, 1)):
    """Largest deviation from NumPy of A[32, 32] @ B[32, 48]."""
    M, N, K = 32, 48, 32
    kernel = metal_kernel("matmul", ["A", "B"], ["C"], source)
    a, b = random_array(0, (M, K), dtype), random_array(1, (K, N), dtype)
    (c,) = kernel(
        inputs=[a, b],
        template=[("T", dtype), ("M", M), ("N", N), ("K", K)],
        grid=(N // 16 * 64, M // 16, 1),
        threadgroup=threadgroup,
        output_shapes=[(M, N)],
        output_dtypes=[mx.float32],
    )
    return np.abs(float64(c) - float64(a) @ float64(b)).max()


def rowsum_error(source, *, dtype=mx.float32, output_dtype=mx.float32):
    """Largest deviation from NumPy of the three row sums of x[3, 300]."""
    R, C = 3, 300
    kernel = metal_kernel("rowsum", ["x"], ["y"], source)
    x = random_array(2, (R, C), dtype)
    (y,) = kernel(
        inputs=[x],
        template=[("T", dtype), ("C", C), ("R", R)],
        grid=(R * 128, 1, 1),
        threadgroup=(128, 1, 1),
        output_shapes=[(R,)],
        output_dtypes=[output_dtype],
    )
    return np.abs(float64(y) - float64(x).sum(1)).max()


def spoil(source, old, new):
    assert source.count(old) >= 1, f"nothing to spoil: {old}"
    return source.replace(old, new, 1)


BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup)"
FILLED, USED = f"{BARRIER}; // filled", f"{BARRIER}; // used"
STORE = "for (int j = 0; j < 2; ++j)\n      simdgroup_store"
MULTIPLY = "simdgroup_multiply_accumulate(acc[j], a, b, acc[j]);"

MATMUL_BUGS = [
    ("missing_barrier_before_reading", FILLED, "", "data race (threadgroup memory)"),
    ("missing_barrier_before_overwriting", USED, "", "data race (threadgroup memory)"),
    ("barrier_without_memory", FILLED, "threadgroup_barrier(mem_flags::mem_none);", "data race (threadgroup memory)"),
    (
        "barrier_of_other_memory",
        FILLED,
        "threadgroup_barrier(mem_flags::mem_device);",
        "data race (threadgroup memory)",
    ),
    (
        "simdgroup_barrier_for_threadgroup_barrier",
        FILLED,
        "simdgroup_barrier(mem_flags::mem_threadgroup);",
        "data race (threadgroup memory)",
    ),
    ("tile_half_filled", "i < 256; i += 64", "i < 128; i += 64", "uninitialised threadgroup memory"),
    ("tile_too_small", "threadgroup T As[16 * 16]", "threadgroup T As[16 * 15]", "out-of-bounds"),
    ("reads_past_the_end", "k0 < K; k0 += 16", "k0 < K + 16; k0 += 16", "out-of-bounds"),
    ("writes_past_the_end", "C + (row0 + sg * 8) * N", "C + (row0 + 16 + sg * 8) * N", "out-of-bounds"),
    ("overlapping_output_tiles", "+ col0 + j * 8, N);", "+ col0 / 2 + j * 8, N);", "data race between threadgroups"),
    ("output_tile_never_written", STORE, STORE.replace("j < 2", "j < 1"), "output not written"),
    (
        "pointer_of_load_differs_between_lanes",
        "&As[sg * 8 * 16 + kk]",
        "&As[sg * 8 * 16 + kk + (thread_index_in_simdgroup & 1)]",
        "non-uniform argument",
    ),
    ("multiply_in_half_a_simdgroup", MULTIPLY, f"if (thread_index_in_simdgroup < 16) {MULTIPLY}", "divergence"),
    ("early_return_before_a_barrier", "for (int k0 = 0;", "if (lid == 63) return;\n    for (int k0 = 0;", "early exit"),
]

DECLARATION = "float s = 0;"
LOOP = "for (uint c = lid; c < C; c += 128) s += x[row * C + c];\n    s = simd_sum(s);"
LEADER = "s = simd_sum(s);\n    if (thread_index_in_simdgroup == 0) part"
PARTIALS = "thread_index_in_simdgroup < 4 ?"
SECOND_SUM = "t = simd_sum(t);"
RESULT = "if (lid == 0) y[row] = t;"
PRIVATE_POINTER = (
    "float s = 0; threadgroup ulong pp[1]; if (lid == 0) pp[0] = (ulong)&s; "
    f"{BARRIER}; if (lid == 1) s = *(thread float*)pp[0];\n {BARRIER};"
)

ROWSUM_BUGS = [
    (
        "reduction_in_half_a_simdgroup",
        "s = simd_sum(s);",
        "if (thread_index_in_simdgroup < 16) s = simd_sum(s);",
        "divergence",
    ),
    (
        "reduction_in_a_loop_of_uneven_length",
        LOOP,
        "for (uint c = lid; c < C; c += 128) s += simd_sum(x[row * C + c]);",
        "divergence",
    ),
    ("barrier_in_one_branch", BARRIER, f"if (simdgroup_index_in_threadgroup == 0) {BARRIER}", "early exit"),
    (
        "barrier_in_both_branches",
        f"{BARRIER};",
        f"if (lid < 64) {{\n {BARRIER};\n }} else {{\n {BARRIER}; }}",
        "divergence",
    ),
    ("all_lanes_write_one_slot", LEADER, "part", "data race (threadgroup memory)"),
    (
        "reads_past_the_partial_sums",
        "thread_index_in_simdgroup < 4 ? part[thread_index_in_simdgroup] : 0.0f",
        "part[thread_index_in_simdgroup]",
        "out-of-bounds",
    ),
    ("shuffle_from_lane_32", SECOND_SUM, "t += simd_shuffle(t, 32 + thread_index_in_simdgroup);", "bad lane"),
    ("shuffle_xor_32", SECOND_SUM, "t += simd_shuffle_xor(t, 32);", "bad lane"),
    (
        "write_to_an_input",
        RESULT,
        "if (lid == 0) { y[row] = t; ((device float*)x)[0] = 0; }",
        "write to read-only input",
    ),
    (
        "index_out_of_a_private_array",
        DECLARATION,
        "float own[4]; for (int i = 0; i <= 4; ++i) own[i] = lid; float s = own[lid % 4] * 0;",
        "out-of-bounds",
    ),
    (
        "signed_overflow",
        DECLARATION,
        "int big = (int(row) + int(C)) * 100000 * 100; float s = big == 1 ? 1 : 0;",
        "undefined behaviour",
    ),
    ("shift_by_32", DECLARATION, "uint by = 32 + lid * 0; float s = float(1u << by) * 0;", "undefined behaviour"),
    (
        "division_by_zero",
        DECLARATION,
        "int zero = int(row) - int(row); float s = float(7 / zero) * 0;",
        "undefined behaviour",
    ),
    (
        "33_kilobytes_of_threadgroup_memory",
        "threadgroup float part[4];",
        "threadgroup float part[4]; threadgroup float big[8448]; big[thread_index_in_threadgroup] = 0;",
        "threadgroup memory limit",
    ),
    (
        "misaligned_vector",
        DECLARATION,
        "float4 v = *(const device float4*)(x + 1 + lid * 0); float s = (v.x + v.w) * 0;",
        "misaligned access",
    ),
    (
        "atomic_order",
        RESULT,
        "if (lid == 0) atomic_store_explicit((device atomic<float>*)(y + row), t, memory_order_seq_cst);",
        "atomic order",
    ),
    ("pointer_to_a_private_variable_is_shared", DECLARATION, PRIVATE_POINTER, "private memory leak"),
]

COMPILE_BUGS = [
    ("undeclared_name", "float s = thread_index;", "'thread_index' was not declared"),
    ("double", "double d = 0; float s = d;", "double_does_not_exist_in_MSL"),
    ("reduction_of_bool", "float s = simd_sum(lid > 3) ? 0 : 0;", "do not accept bool"),
    ("shuffle_of_64_bits", "long q = lid; q = simd_shuffle_xor(q, 1); float s = 0;", "do not accept 64-bit"),
]

# Private memory that nothing was written to holds a pattern of the compiler's.
VALUE_BUGS = [
    ("uninitialised_accumulator", DECLARATION, "float s;"),
    ("combines_3_of_4_partial_sums", PARTIALS, "thread_index_in_simdgroup < 3 ?"),
    (
        "wrong_lane_in_a_butterfly",
        SECOND_SUM,
        "for (ushort m = 1; m < 32; m = m == 2 ? 3 : m == 3 ? 8 : 2 * m) t += simd_shuffle_xor(t, m);",
    ),
]


def by_name(bugs):
    return [pytest.param(*bug, id=name) for name, *bug in bugs]


@pytest.mark.parametrize(("old", "new", "kind"), by_name(MATMUL_BUGS))
def test_bug_in_the_matmul_is_found(old, new, kind):
    with pytest.raises(MetalEmulatorError) as caught:
        matmul_error(spoil(MATMUL, old, new))
    assert kind in caught.value.kinds


@pytest.mark.parametrize(("old", "new", "kind"), by_name(ROWSUM_BUGS))
def test_bug_in_the_row_sum_is_found(old, new, kind):
    with pytest.raises(MetalEmulatorError) as caught:
        rowsum_error(spoil(ROWSUM, old, new))
    assert kind in caught.value.kinds


@pytest.mark.parametrize(("declaration", "words"), by_name(COMPILE_BUGS))
def test_bug_does_not_compile(declaration, words):
    with pytest.raises(MetalCompileError, match="compile error") as caught:
        rowsum_error(spoil(ROWSUM, DECLARATION, declaration))
    assert words in str(caught.value)


def test_float_assigned_to_bfloat_does_not_compile():
    with pytest.raises(MetalCompileError, match="compile error"):
        rowsum_error(ROWSUM, dtype=mx.bfloat16, output_dtype=mx.bfloat16)


def test_threadgroup_of_1056_threads_is_refused():
    with pytest.raises(ValueError, match=r"Thread group size \(1056\)"):
        matmul_error(MATMUL, threadgroup=(1056, 1, 1))


@pytest.mark.parametrize(("old", "new"), by_name(VALUE_BUGS))
def test_bug_shows_in_the_values(old, new):
    assert rowsum_error(spoil(ROWSUM, old, new)) > 1e-2


DTYPES = pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
OPTIONS = pytest.mark.parametrize(
    "options",
    [
        {},
        {"order": "reverse", "reduce_order": "descending"},
        {"order": "random", "seed": 1, "reduce_order": "sequential"},
        {"order": "random", "seed": 2, "fma": True},
        {"check": False},
    ],
    ids=lambda options: "-".join(map(str, options.values())) or "default",
)


@DTYPES
@OPTIONS
def test_right_matmul_has_no_finding(dtype, options):
    with metal_emulator.using(**options, allow=()):
        assert matmul_error(MATMUL, dtype=dtype) < 1e-5


@DTYPES
@OPTIONS
def test_right_row_sum_has_no_finding(dtype, options):
    with metal_emulator.using(**options, allow=()):
        assert rowsum_error(ROWSUM, dtype=dtype) < 1e-4
