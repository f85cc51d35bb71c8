"""What is found besides wrong values, and how it is told."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from tests import metal_emulator
from tests.metal_emulator import MetalCompileError, MetalEmulatorError, metal_kernel
from tests.metal_emulator.findings import KINDS
from tests.metal_emulator.launches import COPY, arange, run

FOLDER = Path(__file__).parent


@pytest.fixture(autouse=True)
def emulator():
    metal_emulator.require()


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32, mx.complex64], ids=str)
def test_unwritten_element_of_an_output_is_nan(dtype):
    with metal_emulator.using(check=False, static_check=False):
        out = run("if (thread_position_in_grid.x == 0) out[0] = x[0];", [mx.ones(4).astype(dtype)])
    assert mx.isnan(out).tolist() == [False, True, True, True]


def test_unwritten_element_of_an_output_is_found():
    with pytest.raises(
        MetalEmulatorError, match=r"3 of 4 elements of 'out' never written \(first: element 1\)"
    ) as caught:
        run("if (thread_position_in_grid.x == 0) out[0] = x[0];", [mx.ones(4)])
    assert caught.value.kinds == ("output not written",)


def test_unwritten_threadgroup_memory_is_nan():
    source = "threadgroup float a[9]; out[thread_position_in_grid.x] = a[thread_position_in_grid.x];"
    with metal_emulator.using(check=False):
        assert np.isnan(np.array(run(source, [mx.ones(9)]))).all()


def test_finding_names_line_buffer_and_thread():
    source = "uint i = thread_position_in_grid.x;\n\nout[i] =\n    x[i + 1];"
    with pytest.raises(MetalEmulatorError, match=r"\n    > x\[i \+ 1\];$") as caught:
        run(source, [arange(40)])
    (finding,) = caught.value.findings
    assert (finding.kind, finding.buffer) == ("out-of-bounds", "x")
    assert (finding.threadgroup, finding.thread) == ((1, 0, 0), (7, 0, 0))


def test_line_counts_from_the_top_of_the_text():
    with metal_emulator.recording() as runs:
        run(COPY, [arange(9)])
    with pytest.raises(MetalEmulatorError) as caught:
        run(COPY.replace("x[", "x[1 + "), [arange(9)])
    at = caught.value.findings[0].line
    assert runs[0].text.splitlines()[at - 1] == COPY


def test_declaration_over_several_lines_keeps_the_numbers():
    source = "threadgroup\n  float\n  a[9];\na[0] = x[9];\nout[thread_position_in_grid.x] = 0;"
    with pytest.raises(MetalEmulatorError, match=r"> a\[0\] = x\[9\];"):
        run(source, [arange(9)])


def test_every_unwritten_output_is_named():
    kernel = metal_kernel("none", [], ["a", "b"], "uint i = thread_position_in_grid.x; (void)i;")
    with pytest.raises(MetalEmulatorError) as caught:
        kernel(
            inputs=[],
            grid=(1, 1, 1),
            threadgroup=(1, 1, 1),
            output_shapes=[(1,)] * 2,
            output_dtypes=[mx.float32] * 2,
        )
    assert [finding.buffer for finding in caught.value.findings] == ["a", "b"]


def test_error_of_the_compiler_names_its_line():
    with (
        metal_emulator.using(static_check=False),
        pytest.raises(MetalCompileError, match=r"> out\[0\] = undeclared;") as caught,
    ):
        run("uint i = thread_position_in_grid.x;\nout[0] = undeclared;", [arange(9)])
    assert "'undeclared' was not declared" in caught.value.findings[0].message


def test_error_inside_the_library_names_the_line_that_led_there():
    with metal_emulator.using(static_check=False), pytest.raises(MetalCompileError) as caught:
        run("uint i = thread_position_in_grid.x;\nout[i] =\n  simd_sum(i > 3);", [arange(9)])
    assert [finding.message for finding in caught.value.findings] == [
        "static assertion failed: MSL: SIMD-group functions do not accept bool"
    ]
    assert str(caught.value).endswith("> simd_sum(i > 3);")


def test_finding_of_the_static_check_comes_before_the_compiler():
    with pytest.raises(MetalCompileError) as caught:
        run("const float* p = x;\nout[thread_position_in_grid.x] = p[0];", [arange(9)])
    assert caught.value.kinds == ("static check",)


def test_infinite_loop_ends_at_the_time_limit():
    source = "volatile int i = 1; while (i) {} out[thread_position_in_grid.x] = 0;"
    with (
        metal_emulator.using(timeout_s=0.2, static_check=False),
        pytest.raises(MetalEmulatorError, match=r"0\.2 s") as caught,
    ):
        run(source, [arange(9)])
    assert caught.value.kinds == ("time limit",)


def test_overrun_hits_a_guard_page_where_accesses_are_not_checked():
    with metal_emulator.using(check=False), pytest.raises(MetalEmulatorError, match="guard page") as caught:
        run("out[thread_position_in_grid.x + 5000] = 0;", [arange(9)])
    assert (caught.value.kinds, caught.value.findings[0].buffer) == (("out-of-bounds",), "out")


def test_private_array_that_is_too_large_is_a_crash():
    source = """
        volatile float own[100000];
        for (uint i = 0; i < 100000; ++i) own[i] = i;
        out[thread_position_in_grid.x] = own[1];
    """
    with (
        metal_emulator.using(static_check=False),
        pytest.raises(MetalEmulatorError, match="stack overflowed") as caught,
    ):
        run(source, [arange(9)])
    assert caught.value.kinds == ("crash",)


def test_emulator_works_after_a_finding():
    with pytest.raises(MetalEmulatorError):
        run(COPY.replace("x[", "x[1 + "), [arange(9)])
    assert run(COPY, [arange(9)]).tolist() == list(range(9))


SAME_VALUE = "out[0] = 1; (void)thread_position_in_grid;"


def test_same_value_written_twice_is_a_note():
    with metal_emulator.recording() as runs:
        run(SAME_VALUE, [mx.ones(9)], shape=(1,), threads=9)
    assert [note.kind for note in runs[0].notes] == ["redundant write"]


def test_finding_of_an_allowed_kind_lets_the_kernel_go_on():
    source = """
        uint i = thread_position_in_grid.x;
        if (i > 3) return;
        out[i] = simd_sum(x[i]);
    """
    with metal_emulator.using(allow=("early exit",)), metal_emulator.recording() as runs:
        out = run(source, [arange(8)], shape=(4,), threads=8)
    assert out.tolist() == [6] * 4
    assert [note.kind for note in runs[0].notes] == ["early exit"]


def test_kind_that_is_not_allowed_is_an_error():
    with metal_emulator.using(allow=()), pytest.raises(MetalEmulatorError) as caught:
        run(SAME_VALUE, [mx.ones(9)], shape=(1,), threads=9)
    assert caught.value.kinds == ("redundant write",)


@pytest.mark.parametrize("kind", KINDS)
def test_kind_is_known_to_the_runtime_and_to_the_readme(kind):
    assert f'return "{kind}";' in (FOLDER / "runtime" / "reports.cpp").read_text()
    assert f"`{kind}`" in (FOLDER / "README.md").read_text()
