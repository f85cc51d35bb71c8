"""What a kernel computes: arrays in and out, the threads of a ragged grid, SIMD-groups, atomics."""

import mlx.core as mx
import numpy as np
import pytest

from tests import metal_emulator
from tests.metal_emulator import MetalEmulatorError, metal_kernel
from tests.metal_emulator.launches import COPY, HISTOGRAM, SUM, arange, run


@pytest.fixture(autouse=True)
def emulator():
    metal_emulator.require()


DTYPES = [
    mx.bool_,
    mx.uint8,
    mx.uint16,
    mx.uint32,
    mx.uint64,
    mx.int8,
    mx.int16,
    mx.int32,
    mx.int64,
    mx.float16,
    mx.bfloat16,
    mx.float32,
    mx.complex64,
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_array_passes_unchanged(dtype):
    x = mx.array([0, 1, 2, 3, 5, 7, 100, 0, 1]).astype(dtype)
    with metal_emulator.using(static_check=False):
        assert mx.array_equal(run(COPY, [x]), x).item()


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32], ids=str)
@pytest.mark.parametrize(
    ("n", "group"),
    [
        pytest.param(100, 256, id="group_larger_than_the_grid"),
        pytest.param(100, 32, id="ragged_last_group"),
        pytest.param(1000, 256, id="ragged_last_simdgroup"),
    ],
)
def test_elementwise_exponential(n, group, dtype):
    x = mx.array(np.random.default_rng(n).standard_normal(n).astype(np.float32)).astype(dtype)
    source = "uint i = thread_position_in_grid.x;\nT value = x[i];\nout[i] = metal::exp(value);"
    out = run(source, [x], group=group, call={"template": [("T", dtype)]})
    assert mx.allclose(out, mx.exp(x), rtol=1e-2 if dtype != mx.float32 else 1e-6).item()


def test_lazy_input_is_evaluated():
    x = arange(9) * 2 + 1
    assert run(COPY, [x]).tolist() == [2 * i + 1 for i in range(9)]


def test_python_scalars_become_scalars_of_the_kernel():
    source = "out[thread_position_in_grid.x] = x[thread_position_in_grid.x] * y + z + (w ? 100 : 0);"
    assert run(source, [mx.ones(5), 3, 0.5, True]).tolist() == [103.5] * 5


def test_template_values_are_constants_of_the_kernel():
    source = "out[thread_position_in_grid.x] = N + (B ? 100 : 0);"
    call = {"template": [("N", -7), ("B", True)]}
    assert run(source, [], shape=(3,), dtype=mx.int32, call=call).tolist() == [93] * 3


def test_non_contiguous_input_is_copied_row_by_row():
    x = arange(4, 6).T
    assert mx.array_equal(run(COPY, [x]), x).item()


def test_several_outputs_of_different_types():
    kernel = metal_kernel(
        "pair", ["x"], ["a", "b"], "uint i = thread_position_in_grid.x; a[i] = x[i]; b[i] = x[i] > 4;"
    )
    a, b = kernel(
        inputs=[arange(9)],
        grid=(9, 1, 1),
        threadgroup=(9, 1, 1),
        output_shapes=[(9,), (3, 3)],
        output_dtypes=[mx.int32, mx.bool_],
    )
    assert (a.tolist(), b.tolist()) == (list(range(9)), [[False] * 3, [False, False, True], [True] * 3])


def test_init_value_fills_what_is_not_written():
    source = "if (thread_position_in_grid.x == 1) out[1] = x[1];"
    assert run(source, [arange(4)], call={"init_value": 5}).tolist() == [5, 1, 5, 5]


def test_empty_input_may_stay_unread():
    assert run("out[thread_position_in_grid.x] = 1;", [mx.zeros((0, 3))], shape=(2,)).tolist() == [1, 1]


def test_reading_an_empty_input_is_out_of_bounds():
    with pytest.raises(MetalEmulatorError) as caught:
        run(COPY, [mx.zeros((0, 3))], shape=(2,))
    assert caught.value.kinds == ("out-of-bounds",)


def test_empty_output_stays_empty():
    assert run("uint i = thread_position_in_grid.x; (void)i;", [mx.ones(9)], shape=(0,), threads=1).shape == (0,)


def test_shape_strides_and_ndim_are_those_of_a_contiguous_array():
    source = """
        uint i = thread_position_in_grid.x;
        out[i] = x[elem_to_loc(i, x_shape, x_strides, x_ndim)] * 2;
    """
    x = arange(3, 5, 7)
    assert mx.array_equal(run(source, [x]), x * 2).item()


def test_grid_has_three_axes():
    source = """
        uint3 p = thread_position_in_grid, n = threads_per_grid;
        out[(p.z * n.y + p.y) * n.x + p.x] = p.x + 10 * p.y + 100 * p.z;
    """
    kernel = metal_kernel("cube", [], ["out"], source)
    (out,) = kernel(
        inputs=[], grid=(3, 5, 2), threadgroup=(2, 2, 2), output_shapes=[(2, 5, 3)], output_dtypes=[mx.int32]
    )
    expected = [[[x + 10 * y + 100 * z for x in range(3)] for y in range(5)] for z in range(2)]
    assert out.tolist() == expected


ATTRIBUTES = [
    ("thread_index_in_threadgroup", [*range(40), *range(30)]),
    ("thread_index_in_simdgroup", [*range(32), *range(8), *range(30)]),
    ("simdgroup_index_in_threadgroup", [0] * 32 + [1] * 8 + [0] * 30),
    ("simdgroups_per_threadgroup", [2] * 40 + [1] * 30),
    ("dispatch_simdgroups_per_threadgroup", [2] * 70),
    ("threads_per_simdgroup", [32] * 70),
    ("threadgroup_position_in_grid.x", [0] * 40 + [1] * 30),
    ("threads_per_threadgroup.x", [40] * 40 + [30] * 30),
    ("dispatch_threads_per_threadgroup.x", [40] * 70),
    ("threadgroups_per_grid.x", [2] * 70),
    ("grid_size.x", [70] * 70),
    ("thread_index_in_quadgroup", [i % 4 for i in [*range(40), *range(30)]]),
]


@pytest.mark.parametrize(("attribute", "values"), ATTRIBUTES, ids=[name for name, _ in ATTRIBUTES])
def test_attribute_in_a_ragged_grid(attribute, values):
    source = f"out[thread_position_in_grid.x] = {attribute};"
    assert run(source, [], shape=(70,), dtype=mx.uint32, group=40).tolist() == values


def test_sum_of_a_partial_simdgroup_is_over_the_lanes_that_exist():
    assert run(SUM, [arange(20)], shape=(1,), threads=20).item() == 190


SIMD_FUNCTIONS = {
    "simd_max(x[i])": [31] * 32,
    "simd_prefix_inclusive_sum(x[i])": [i * (i + 1) // 2 for i in range(32)],
    "simd_prefix_exclusive_sum(x[i])": [i * (i - 1) // 2 for i in range(32)],
    "simd_shuffle(x[i], ushort(31 - i))": list(range(31, -1, -1)),
    "simd_shuffle_xor(x[i], 1)": [i ^ 1 for i in range(32)],
    "simd_shuffle_up(x[i], 2)": [i if i < 2 else i - 2 for i in range(32)],
    "simd_shuffle_down(x[i], 2)": [i if i > 29 else i + 2 for i in range(32)],
    "simd_shuffle_and_fill_up(x[i], -x[i], 2)": [-30, -31, *range(30)],
    "simd_shuffle_and_fill_down(x[i], -x[i], 2)": [*range(2, 32), 0, -1],
    "simd_broadcast(x[i], 7)": [7] * 32,
    "simd_broadcast_first(x[i])": [0] * 32,
    "simd_all(i < 32) + 2 * simd_any(i > 40)": [1] * 32,
    "ulong(simd_vote::vote_t(simd_ballot(i == 3)))": [8] * 32,
    "quad_sum(x[i])": [16 * (i // 4) + 6 for i in range(32)],
}


@pytest.mark.parametrize(("expression", "values"), SIMD_FUNCTIONS.items(), ids=SIMD_FUNCTIONS)
def test_simd_function(expression, values):
    with metal_emulator.using(static_check=False):
        out = run(f"uint i = thread_position_in_grid.x; out[i] = {expression};", [arange(32)])
    # -0 is 0.
    assert out.tolist() == values


def test_shuffle_from_a_lane_that_does_not_exist_is_found():
    source = "out[thread_position_in_grid.x] = simd_shuffle_xor(x[thread_position_in_grid.x], 16);"
    with pytest.raises(MetalEmulatorError) as caught:
        run(source, [arange(20)])
    assert caught.value.kinds == ("bad lane",)


def test_atomic_histogram():
    x = mx.array(np.random.default_rng(0).integers(0, 100, 300))
    out = run(HISTOGRAM, [x], shape=(8,), dtype=mx.int32, threads=300, atomic_outputs=True, call={"init_value": 0})
    assert out.tolist() == np.bincount(np.array(x) & 7, minlength=8).tolist()


def test_histogram_without_atomics_is_a_race():
    x = mx.array(np.arange(300, dtype=np.int32))
    source = "out[x[thread_position_in_grid.x] & 7] += 1;"
    with pytest.raises(MetalEmulatorError) as caught:
        run(source, [x], shape=(8,), threads=300, group=300, call={"init_value": 0})
    assert "data race (device memory)" in caught.value.kinds


def test_atomic_update_of_an_output_without_init_value_is_found():
    x = mx.array(np.arange(300, dtype=np.int32))
    with pytest.raises(MetalEmulatorError) as caught:
        run(HISTOGRAM, [x], shape=(8,), threads=300, atomic_outputs=True)
    assert "uninitialised output read" in caught.value.kinds


THREADGROUP_VARIABLES = """
    threadgroup float a[32], b[2][16];
    threadgroup
        float2 c[32];
    struct Pair { float first; int second; };
    threadgroup Pair pair;
    uint i = thread_position_in_grid.x;
    a[i] = x[i];
    b[i / 16][i % 16] = 2 * x[i];
    c[i] = float2(x[i], 1);
    if (i == 0) { pair.first = 0.5f; pair.second = 3; }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    uint j = 31 - i;
    threadgroup float* p = a + j;
    out[i] = *p + b[j / 16][j % 16] + c[j].y + pair.first + pair.second;
"""


def test_threadgroup_variables_of_every_form():
    with metal_emulator.using(static_check=False):
        out = run(THREADGROUP_VARIABLES, [arange(32)])
    assert out.tolist() == [3 * (31 - i) + 4.5 for i in range(32)]
