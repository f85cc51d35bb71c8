"""What a launch did: bytes, barriers and operations against numbers counted by hand."""

import mlx.core as mx
import numpy as np
import pytest

from tests import metal_emulator
from tests.metal_emulator import Traffic
from tests.metal_emulator.launches import COPY, HISTOGRAM, SUM, arange, run


@pytest.fixture(autouse=True)
def emulator():
    metal_emulator.require()


def test_traffic_is_counted_by_buffer():
    """Each of 64 threads reads its own x and a constant, and writes its own element; every other reads y as well."""
    source = """
        uint i = thread_position_in_grid.x;
        float v = x[i] + x_shape[0];
        if (i % 2 == 0) v += y[3];
        out[i] = v;
    """
    with metal_emulator.recording() as runs:
        run(source, [arange(64), arange(16)])
    assert runs[0].traffic == {
        "x": Traffic(256, 0, 256, 0),
        "x_shape": Traffic(256, 0, 4, 0),
        "y": Traffic(128, 0, 4, 0),
        "out": Traffic(0, 256, 0, 256),
    }


def test_traffic_of_narrow_types_and_vectors():
    source = """
        uint i = thread_position_in_grid.x;
        const device float4* rows = (const device float4*)x;
        out[i] = rows[i / 2].x;
    """
    with metal_emulator.recording() as runs:
        run(source, [arange(64)], shape=(32,), dtype=mx.float16)
    assert runs[0].traffic["out"] == Traffic(0, 64, 0, 64)
    assert runs[0].traffic["x"].distinct_bytes_read in (64, 256)


def test_atomic_update_reads_and_writes():
    x = mx.array(np.arange(300, dtype=np.int32))
    with metal_emulator.recording() as runs:
        run(HISTOGRAM, [x], shape=(8,), threads=300, atomic_outputs=True, call={"init_value": 0})
    assert runs[0].traffic["out"] == Traffic(1200, 1200, 32, 32)


def test_threadgroup_memory_is_counted_apart():
    """32 threads in each of two groups: write 4 bytes and read 4 of an array of 128."""
    source = """
        threadgroup float a[32];
        uint i = thread_index_in_threadgroup;
        a[i] = x[thread_position_in_grid.x];
        threadgroup_barrier(mem_flags::mem_threadgroup);
        out[thread_position_in_grid.x] = a[31 - i];
    """
    with metal_emulator.recording() as runs:
        run(source, [arange(64)])
    figures = runs[0]
    assert (figures.threadgroup_bytes, figures.threadgroup_bytes_read, figures.threadgroup_bytes_written) == (
        128,
        256,
        256,
    )
    assert (figures.barriers, figures.simd_operations, figures.accesses) == (2, 0, 4 * 64)


def test_run_says_what_was_launched():
    with metal_emulator.recording() as runs:
        run(SUM, [arange(64)], shape=(1,), threads=64, group=256, call={"init_value": 0})
    figures = runs[0]
    assert (figures.name, figures.grid, figures.threadgroup) == ("example", (64, 1, 1), (64, 1, 1))
    assert (figures.simd_operations, figures.threadgroup_bytes) == (2, 0)
    assert SUM in figures.text


def test_nothing_is_counted_without_the_checks():
    with metal_emulator.using(check=False), metal_emulator.recording() as runs:
        run(COPY, [arange(9)])
    assert (runs[0].accesses, runs[0].traffic) == (0, {})


def test_recordings_nest():
    with metal_emulator.recording() as outer:
        run(COPY, [arange(9)])
        with metal_emulator.recording() as inner:
            run(COPY, [arange(9)])
    run(COPY, [arange(9)])
    assert (len(outer), len(inner), outer[1]) == (2, 1, inner[0])


@pytest.mark.parametrize(
    ("expression", "overflowed"),
    [
        ("x[i] * 1e30f > 0 ? 1.0f : 2.0f", False),
        ("1.0f / (x[i] * 1e30f * 1e30f)", True),
        ("1.0f / (1.0f + metal::exp(x[i] * 100.0f))", True),
        ("x[i] / (x[i] - x[i])", True),
        ("metal::exp(-100.0f * x[i])", False),
    ],
    ids=["large", "beyond_the_largest", "beyond_the_largest_inside_a_fraction", "division_by_zero", "underflow"],
)
def test_a_result_beyond_the_numbers_is_told_even_in_between(expression, overflowed):
    with metal_emulator.recording() as runs:
        run(f"uint i = thread_position_in_grid.x; out[i] = {expression};", [arange(64) + 1])
    assert runs[0].overflowed is overflowed
