"""ensure_row_contiguous=False: every input comes with strides that a kernel must not ignore."""

import mlx.core as mx
import numpy as np
import pytest

from tests import metal_emulator
from tests.metal_emulator import MetalEmulatorError
from tests.metal_emulator.launches import arange, run


@pytest.fixture(autouse=True)
def emulator():
    metal_emulator.require()


ROW_SUM = """
    uint row = thread_position_in_grid.x;
    float s = 0;
    for (int c = 0; c < x_shape[1]; ++c) s += x[INDEX];
    out[row] = s;
"""
BY_STRIDES = ROW_SUM.replace("INDEX", "row * x_strides[0] + c * x_strides[1]")
IGNORES_STRIDES = ROW_SUM.replace("INDEX", "row * x_shape[1] + c")

VIEWS = {
    "row_contiguous": arange(4, 6),
    "transposed": arange(6, 4).T,
    "every_other_column": arange(4, 12)[:, ::2],
    "middle_columns": arange(4, 12)[:, 3:9],
    "backwards": arange(4, 6)[::-1, ::-1],
    "repeated": mx.broadcast_to(arange(6), (4, 6)),
    "one_row": arange(1, 6),
    "bfloat16": arange(4, 6, dtype=mx.bfloat16).T.T,
}


@pytest.mark.parametrize("x", VIEWS.values(), ids=VIEWS)
def test_kernel_that_uses_strides_reads_any_view(x):
    out = run(BY_STRIDES, [x], shape=(x.shape[0],), dtype=mx.float32, ensure_row_contiguous=False)
    assert out.tolist() == np.array(x.astype(mx.float32)).sum(1).tolist()


@pytest.mark.parametrize("x", [VIEWS["row_contiguous"], VIEWS["bfloat16"]], ids=["float32", "bfloat16"])
def test_kernel_that_ignores_strides_is_found_even_on_a_contiguous_input(x):
    with pytest.raises(MetalEmulatorError, match="use 'x_strides'") as caught:
        run(IGNORES_STRIDES, [x], shape=(4,), dtype=mx.float32, ensure_row_contiguous=False)
    assert (caught.value.kinds, caught.value.findings[0].buffer) == (("padding read",), "x")


def test_kernel_that_ignores_the_stride_of_an_outer_axis_is_found():
    source = """
        uint i = thread_position_in_grid.x;
        out[i] = x[(i / 20 * x_shape[1] + i / 5 % 4) * x_strides[1] + i % 5];
    """
    with pytest.raises(MetalEmulatorError) as caught:
        run(source, [arange(3, 4, 5)], ensure_row_contiguous=False)
    assert caught.value.kinds == ("padding read",)


def test_padding_is_nan_where_accesses_are_not_checked():
    with metal_emulator.using(check=False):
        out = run(IGNORES_STRIDES, [arange(4, 6)], shape=(4,), ensure_row_contiguous=False)
    assert np.isnan(np.array(out)).any()


@pytest.mark.parametrize(
    ("x", "strides"),
    [
        pytest.param(arange(6, 4).T, [1, 4], id="transposed"),
        pytest.param(arange(4, 12)[:, ::2], [12, 2], id="every_other_column"),
        pytest.param(arange(4, 6)[::-1], [-6, 1], id="backwards"),
        pytest.param(mx.broadcast_to(arange(6), (4, 6)), [0, 1], id="repeated"),
    ],
)
def test_strides_of_a_view_are_mlx_own(x, strides):
    source = "out[thread_position_in_grid.x] = x_strides[thread_position_in_grid.x];"
    assert run(source, [x], shape=(2,), dtype=mx.int64, ensure_row_contiguous=False).tolist() == strides


def test_scalar_input_needs_no_strides():
    source = "out[thread_position_in_grid.x] = y;"
    assert run(source, [mx.ones(3), 2.5], ensure_row_contiguous=False).tolist() == [2.5] * 3


def test_empty_input_has_strides():
    source = "out[thread_position_in_grid.x] = x_strides[1] + x_shape[0];"
    x = mx.zeros((0, 3))
    assert run(source, [x], shape=(2,), dtype=mx.int32, ensure_row_contiguous=False).tolist() == [1, 1]
