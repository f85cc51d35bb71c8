"""Which declarations become references into the runtime's memory, and which stay."""

import pytest

from tests.metal_emulator.rewrite import rewrite_threadgroup_variables

VARIABLES = {
    "scalar": ("threadgroup float a;", ["a"]),
    "array": ("threadgroup float a[9];", ["a"]),
    "several": ("threadgroup float a[9], b, c[2][3];", ["a", "b", "c"]),
    "vector": ("threadgroup metal::vec<float, 4> a[9];", ["a"]),
    "comparison_in_the_extent": ("threadgroup float a[(N > 4) ? N : 4], b;", ["a", "b"]),
    "less_in_the_extent": ("threadgroup float a[N < 4 ? 4 : N]; if (N > 2) return;", ["a"]),
    "product_in_the_extent": ("threadgroup float a[N * sizeof(T)];", ["a"]),
    "over_several_lines": ("threadgroup\n  float\n  a[9];", ["a"]),
    "after_a_comment": ("// threadgroup float b;\nthreadgroup float a; /* threadgroup float c; */", ["a"]),
    "comment_inside": ("threadgroup float a[9 /* & more */];", ["a"]),
    "in_a_block": ("{ threadgroup float a; }", ["a"]),
    "after_a_condition": ("if (x) threadgroup float a;", ["a"]),
}
OTHERS = {
    "pointer": "threadgroup float* p = a;",
    "reference": "threadgroup float& r = a[0];",
    "parameter": "void f(threadgroup float* p, uint n);",
    "parameter_after_a_parameter": "void f(uint n, threadgroup const float* p) {}",
    "cast": "p = (threadgroup float*)q;",
    "function": "threadgroup float* f(threadgroup float* p);",
    "attribute_of_a_parameter": "kernel void f(threadgroup float* p [[mtl_threadgroup(0)]]);",
    "comment": "// threadgroup float a;",
    "barrier": "threadgroup_barrier(mem_flags::mem_threadgroup);",
}


@pytest.mark.parametrize(("text", "names"), VARIABLES.values(), ids=VARIABLES)
def test_variable_is_found(text, names):
    rewritten = rewrite_threadgroup_variables(text)
    assert [name for name in "abc" if f'>("{name}")' in rewritten] == names


@pytest.mark.parametrize("text", OTHERS.values(), ids=OTHERS)
def test_what_declares_no_variable_stays(text):
    assert rewrite_threadgroup_variables(text) == text


@pytest.mark.parametrize("text", [text for text, _ in VARIABLES.values()], ids=VARIABLES)
def test_lines_keep_their_numbers(text):
    assert rewrite_threadgroup_variables(text).count("\n") == text.count("\n")


def test_variables_of_a_text_have_numbers_of_their_own():
    rewritten = rewrite_threadgroup_variables("threadgroup float a, b;\nthreadgroup int c;")
    assert [f"_type_{number}, {number}>" in rewritten for number in range(4)] == [True, True, True, False]
