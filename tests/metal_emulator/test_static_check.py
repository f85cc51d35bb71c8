"""What the static check finds in a kernel's text, and the kernels in which it must find nothing."""

import sys
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models import gated_delta

from tests.metal_emulator import require, static_check
from tests.metal_emulator.check import parser
from tests.metal_emulator.check.source import mlx_include
from tests.metal_emulator.launches import MATMUL, ROWSUM
from tests.metal_emulator.signature import generate


@pytest.fixture(autouse=True)
def needs_the_emulator() -> None:
    require()


DTYPES = [pytest.param(dtype, id=str(dtype).split(".")[-1]) for dtype in (mx.float32, mx.float16, mx.bfloat16)]

# With an output of any type, which a bfloat needs the cast for.
ROW_SUM = ROWSUM.replace("y[row] = t;", "y[row] = static_cast<T>(t);")

# Header and statements that use it; a kernel may have them without a word from the check.
HELPERS = """
    constant float LUT[2] = {1, 2};
    static constexpr constant int WIDTH = 4;
    struct Pair {
      float first, second;
      float sum(float scale) const thread { return scale * (first + second); }
    };
    template <int N, typename P>
    inline float total(P p) {
      float t = 0;
      for (int i = 0; i < N; ++i) t += p[i];
      return t;
    }
    inline void bump(thread float& a) { a += 1.0f; }
    METAL_FUNC thread float& itself(thread float& a) { return a; }
    inline void step(const device float*& p, int by) { p += by; }
    inline float last(const threadgroup float a[4]) { return a[3]; }
"""

CLEAN_STATEMENTS = [
    pytest.param("float4 v = 0; v = fma(v, v, float4(1)); v = max(v, 0.f); s += dot(v, v.wzyx);", id="vectors"),
    pytest.param("float4 v = float4(s); v.xy = v.zw; v[1] = s; v = select(v, v.yxwz, v < 0.f);", id="swizzles"),
    pytest.param(
        "half4 h = 0; auto v = float4(h); v = static_cast<float4>(h); v = vec<float, 4>(h);", id="vector_casts"
    ),
    pytest.param(
        "uint2 u(1, min(lid, 2u)); const uint3 w(u, 3); float4 z = float4(s); s += w.z;", id="vector_constructors"
    ),
    pytest.param("s = fma(s, s, 0.5) + metal::exp(s) + precise::log(s) + fast::exp(s) + rsqrt(s);", id="math"),
    pytest.param("T b = x[0]; b = fma(b, b, b); b = metal::exp(b); b = simd_sum(b); s += b;", id="math_of_any_type"),
    pytest.param("s += log1p(s); T b = log1p(x[0]); s = min(s, Limits<float>::max) + float(b);", id="mlx_utils"),
    pytest.param("s += x[elem_to_loc(lid, x_shape, x_strides, x_ndim)];", id="elem_to_loc"),
    pytest.param("s = simd_shuffle_xor(s, 1) + simd_shuffle(s, 3) + simd_max(s);", id="simdgroup"),
    pytest.param("simdgroup_float8x8 a, b; simdgroup_load(a, part, 8, ulong2(0, 1), true);", id="transposed_load"),
    pytest.param("simdgroup_float8x8 a, b; simdgroup_multiply(b, a, a); b.thread_elements()[0] += 1;", id="matrix"),
    pytest.param("simdgroup_barrier(mem_flags::mem_threadgroup | mem_flags::mem_device);", id="flags"),
    pytest.param("float r[4]; thread float* p = r; threadgroup float* q = part; p[0] = q[0];", id="pointers"),
    pytest.param("auto p = x + row; auto q = part; auto& r = s; r += p[0] + q[0];", id="auto"),
    pytest.param("float r[4]; for (thread float& e : r) e = 1;", id="loop_over_references"),
    pytest.param("float4 v = *(const device float4*)(x + 4 * lid); s += v.x;", id="cast_to_vector"),
    pytest.param("alignas(16) threadgroup vec<T, 4> a[8]; threadgroup float b, c[2]; b = c[0];", id="threadgroup"),
    pytest.param("float r[2] = {1, 2}; s += total<2>(r) + total<4>(part) + total<3>(LUT);", id="any_space"),
    pytest.param("Pair p = {1, 2}; bump(s); s += p.sum(WIDTH) + last(part) + LUT[1];", id="helpers"),
    pytest.param("half h = 1.5h; bfloat b = 1.0bf; h = half(b); b = bfloat(h); s = h; s = b;", id="conversions"),
    pytest.param("T b = lid; b = static_cast<T>(s); b = T(s * b); s = b;", id="conversions_of_any_type"),
    pytest.param("Pair p = {1, 2}; thread Pair* q = &p; s += q->sum(2);", id="method_through_pointer"),
    pytest.param("threadgroup typename ConditionalType<true, T, float>::type a[2]; a[0] = a[1];", id="dependent_type"),
    pytest.param("// new: printf, std::max, goto, double, [&](float a) {}, erf(x)", id="comment"),
    pytest.param("atomic_fetch_add_explicit((device atomic<int>*)y, 1, memory_order_relaxed);", id="atomic"),
]

# id, header, statements, the line that they name, what the finding says.
BUGS = [
    (
        "unqualified_pointer_parameter",
        "float ld(const float* p) { return p[0]; }",
        "s += ld(x);",
        "to address space 'thread'",
    ),
    ("unqualified_pointer_to_private", "", "float r[2]; float* p = r;", "'p': pointer or reference without device"),
    (
        "unqualified_pointer_to_device",
        "",
        "const float* p = x;",
        "cannot initialize a variable of type 'const float *'",
    ),
    ("unqualified_reference", "void add(float& a) { a += 1; }", "add(s);", "'a': pointer or reference without device"),
    ("unqualified_array_reference", "float f(float (&a)[4]) { return a[0]; }", "", "'a': pointer or reference without"),
    ("unqualified_result", "float* f(thread float* a) { return a; }", "", "'f': pointer or reference without device"),
    ("unqualified_cast", "", "auto p = (float4*)&s;", "'float4 *': pointer or reference without device"),
    (
        "unqualified_reinterpret_cast",
        "",
        "auto p = reinterpret_cast<uint*>(&s);",
        "'uint *': pointer or reference without",
    ),
    (
        "threadgroup_wanted",
        "float ld(const threadgroup float* p) { return p[0]; }",
        "s += ld(x);",
        "to address space 'threadgroup'",
    ),
    (
        "device_wanted",
        "float ld(const device float* p) { return p[0]; }",
        "s += ld(part);",
        "from 'threadgroup float[4]' to 'device",
    ),
    (
        "constant_through_device",
        "constant float LUT[2] = {1, 2};",
        "const device float* p = LUT;",
        "of type 'constant float[2]'",
    ),
    (
        "template_loses_space",
        "template <typename P> float f(P p) { float r; P q = &r; return q[0]; }",
        "s += f(part);",
        "'float *'",
    ),
    ("constant_missing", "static constexpr int WIDTH = 4;", "", "'WIDTH': outside of functions there is `constant`"),
    (
        "threadgroup_memory_in_a_helper",
        "float f() { threadgroup float a[2]; return a[0]; }",
        "",
        "only a kernel declares",
    ),
    ("const_dropped", "", "device float* p = x;", "cannot initialize a variable of type 'device float *'"),
    ("write_to_input", "", "x[0] = 1;", "read-only variable is not assignable"),
    ("write_to_constant", "constant float LUT[2] = {1, 2};", "LUT[0] = 1;", "cannot assign to variable 'LUT'"),
    ("undeclared_name", "", "s = thread_index;", "use of undeclared identifier 'thread_index'"),
    ("ambiguous_max", "", "s = max(0, s);", "call to 'max' is ambiguous"),
    ("reduction_of_bool", "", "s = simd_sum(lid > 3);", "call to deleted function 'simd_sum'"),
    ("shuffle_of_long", "", "long q = simd_shuffle_xor(long(lid), 1);", "call to 'simd_shuffle_xor' is ambiguous"),
    (
        "order_not_relaxed",
        "",
        "atomic_load_explicit((device atomic<int>*)y, memory_order_seq_cst);",
        "'memory_order_seq_cst'",
    ),
    ("matrix_of_four", "", "simdgroup_matrix<float, 4, 4> a;", "SIMD-group matrices are 8 x 8"),
    ("uninitialized", "", "float t; s += t;", "variable 't' is uninitialized"),
    ("half_to_bfloat", "", "half h = 1; bfloat b = h;", "cannot initialize a variable of type 'bfloat'"),
    ("float_to_bfloat", "", "bfloat b = s;", "a float becomes a bfloat without a cast"),
    ("float_constant_to_bfloat", "", "bfloat b = 0.5f;", "a float becomes a bfloat without a cast"),
    ("float_returned_as_bfloat", "bfloat f(float a) { return a; }", "", "'float' to 'bfloat'"),
    (
        "float_to_type_bfloat",
        "template <typename B> B f(float a) { return a; }",
        "f<bfloat>(s);",
        "'float' to 'bfloat'",
    ),
    (
        "float_added_to_type_bfloat",
        "template <typename B> void f(B b, float a) { b += a; }",
        "f(1.0bf, s);",
        "a bfloat wants a cast",
    ),
    ("lambda", "", "auto f = [&](float a) { s += a; }; f(0);", "'[&]': a lambda needs Metal 3.2"),
    ("lambda_without_parameters", "", "auto f = [=] { return 1; };", "'[=]': a lambda needs Metal 3.2"),
    ("std", "", "s = std::max(0.f, 0.f);", "'std::': Metal has no std::"),
    ("double", "", "double d = 0;", "'double': Metal has no double"),
    ("goto", "", "goto end; end:;", "'goto': Metal has no goto"),
    ("new", "", "thread float* p = new float[2];", "'new': Metal has no heap"),
    ("exception", "", "throw 1;", "'throw': Metal has no exceptions"),
    ("virtual", "struct A { virtual void f(); };", "", "'virtual': Metal has no virtual functions"),
    ("builtin_of_clang", "", "s = __builtin_sqrtf(s);", "'__builtin_sqrtf': a built-in of clang"),
    ("printf", "", 'printf("%f", s);', "'printf': Metal 3.1 prints nothing"),
    ("include", "#include <cmath>", "", "no file but Metal's own headers"),
    ("include_of_mlx", '#include "mlx/backend/metal/kernels/erf.h"', "", "no file but Metal's own headers"),
    ("function_of_metal_that_mlx_never_calls", "", "float4 v = 1; v = normalize(v);", "'normalize': no kernel of MLX"),
    ("function_of_mlx_outside_the_preamble", "", "s = erf(s);", "use of undeclared identifier 'erf'"),
    ("function_of_nobody", "", "s = mysterious(s);", "'mysterious': no kernel of MLX"),
]


def text_of(source: str, inputs: dict, outputs: dict, template: dict, *, header: str = "") -> str:
    """The text for inputs {name: array}, outputs {name: dtype} and template values {name: value}."""
    return generate(
        "kernel",
        list(inputs),
        list(outputs),
        source,
        header=header,
        atomic_outputs=False,
        inputs=list(inputs.values()),
        output_dtypes=list(outputs.values()),
        template=list(template.items()),
    ).text


def row_sum(statements: str = "", *, header: str = "", dtype: Any = mx.float32, R: int = 3, C: int = 300) -> str:
    """The text of the row-sum kernel with further statements on one line of their own."""
    source = ROW_SUM.replace("float s = 0;", f"float s = 0;\n{statements}")
    inputs, template = {"x": mx.zeros((R, C), dtype)}, {"T": dtype, "C": C, "R": R}
    return text_of(source, inputs, {"y": dtype}, template, header=header and f"{header}\n")


def line_number(finding: str) -> int:
    return int(finding.removeprefix("line ").partition(":")[0])


def line_of(text: str, part: str) -> int:
    return text.count("\n", 0, text.index(part)) + 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sum_over_simdgroups_is_clean(dtype: Any) -> None:
    assert static_check.check(row_sum(dtype=dtype)) == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_product_of_matrices_is_clean(dtype: Any) -> None:
    inputs = {"A": mx.zeros((32, 32), dtype), "B": mx.zeros((32, 48), dtype)}
    template = {"T": dtype, "M": 32, "N": 48, "K": 32}
    assert static_check.check(text_of(MATMUL, inputs, {"C": mx.float32}, template)) == []


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The keywords of every kernel made while this fixture stands in for Metal."""
    kernels: list[dict[str, Any]] = []
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx.fast, "metal_kernel", lambda **keywords: kernels.append(keywords))
    return kernels


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("factory", "variant"),
    [
        pytest.param("_make_gated_delta_kernel", {}, id="plain"),
        pytest.param("_make_gated_delta_kernel", {"has_mask": True}, id="masked"),
        pytest.param("_make_gated_delta_kernel", {"vectorized": True}, id="decay_per_channel"),
        pytest.param("_make_gated_delta_kernel", {"has_mask": True, "vectorized": True}, id="masked_decay_per_channel"),
        pytest.param("_make_gated_delta_kernel_xtree", {}, id="tree"),
        pytest.param("_make_gated_delta_packed_kernel", {}, id="packed"),
    ],
)
def test_the_gated_delta_kernels_of_mlx_lm_are_clean(
    factory: str, variant: dict[str, bool], dtype: Any, recorded: list[dict[str, Any]]
) -> None:
    if not hasattr(gated_delta, factory):
        pytest.skip("this mlx-lm has no such kernel")
    getattr(gated_delta, factory)(**variant)
    B, T, Hk, Hv, Dk, Dv = 1, 4, 2, 4, 128, 16
    (kernel,) = recorded
    shapes = {"q": (B, T, Hk, Dk), "k": (B, T, Hk, Dk), "v": (B, T, Hv, Dv), "beta": (B, T, Hv), "mask": (B, T)}
    shapes |= {"g": (B, T, Hv, Dk) if variant.get("vectorized") else (B, T, Hv), "state_in": (B, Hv, Dv, Dk), "T": ()}
    dtypes = {"g": mx.float32, "state_in": mx.float32, "T": mx.int32, "mask": mx.bool_}
    inputs = {name: mx.zeros(shapes[name], dtypes.get(name, dtype)) for name in kernel["input_names"]}
    template = {"InT": dtype, "StT": mx.float32, "Dk": Dk, "Dv": Dv, "Hk": Hk, "Hv": Hv}
    text = text_of(kernel["source"], inputs, {"y": dtype, "state_out": mx.float32}, template)
    assert static_check.check(text) == []


# These include nothing of MLX's, so that their text is all there is.
@pytest.mark.parametrize("name", ["copy", "cross_entropy", "logsumexp", "softmax", "ternary"])
def test_a_kernel_of_mlx_is_clean(name: str) -> None:
    text = (mlx_include() / f"mlx/backend/metal/kernels/{name}.h").read_text()
    assert static_check.check(text) == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("statements", CLEAN_STATEMENTS)
def test_nothing_is_said_about(statements: str, dtype: Any) -> None:
    assert static_check.check(row_sum(statements, header=HELPERS, dtype=dtype)) == []


@pytest.mark.parametrize(("header", "statements", "what"), [pytest.param(*bug[1:], id=bug[0]) for bug in BUGS])
def test_a_bug_is_found_on_its_line(header: str, statements: str, what: str) -> None:
    text = row_sum(statements, header=header)
    findings = static_check.check(text)
    assert any(what in finding for finding in findings), findings
    assert {line_number(finding) for finding in findings} <= {
        line_of(text, part) for part in (header, statements) if part
    }


def test_a_float_for_a_bfloat_output_is_found() -> None:
    text = row_sum(dtype=mx.bfloat16).replace("y[row] = static_cast<T>(t)", "y[row] = t")
    findings = static_check.check(text)
    assert findings
    assert {line_number(finding) for finding in findings} == {line_of(text, "y[row] = t")}


@pytest.mark.parametrize(
    ("C", "first"),
    [
        pytest.param(7, "no matching function for call to 'ld'", id="seven_elements_are_constant"),
        pytest.param(8, None, id="eight_elements_are_device"),
    ],
)
def test_a_helper_for_device_memory_does_not_take_a_small_input(C: int, first: str | None) -> None:
    header = "float ld(const device float* p, uint i) { return p[i]; }"
    findings = static_check.check(row_sum("s += ld(x, lid);", header=header, R=1, C=C))
    assert [first in finding for finding in findings] == [True] * (first is not None)


def test_findings_come_in_the_order_of_their_lines() -> None:
    text = row_sum("goto end;\nbfloat b = s;\ns = mysterious(s);\nend:;")
    numbers = [line_number(finding) for finding in static_check.check(text)]
    assert len(numbers) >= 3
    assert numbers == sorted(numbers)


@pytest.mark.parametrize(
    ("layer", "statements"),
    [
        pytest.param(static_check.clang_findings, "device float* p = x;", id="clang"),
        pytest.param(static_check.lint, "goto end; end:;", id="lint"),
        pytest.param(static_check.unknown_names, "auto v = normalize(float4(s));", id="names"),
    ],
)
def test_a_layer_stands_alone(layer: Callable[[str], list[str]], statements: str) -> None:
    text = row_sum(statements)
    (finding,) = layer(text)
    assert line_number(finding) == line_of(text, statements)
    assert layer(row_sum()) == []


def test_the_callers_list_is_their_own() -> None:
    text = row_sum("goto end; end:;")
    static_check.check(text).clear()
    assert static_check.check(text) != []


def test_without_libclang_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "clang", None)
    with pytest.raises(RuntimeError, match="pip install libclang"):
        static_check.clang_findings(row_sum())


def test_declarations_that_do_not_parse_are_no_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = [
        (path, "nonsense;" if path.endswith("logging.h") else content) for path, content in parser.virtual_files()
    ]
    monkeypatch.setattr(parser, "virtual_files", lambda: broken)
    with pytest.raises(RuntimeError, match=r"declarations .* do not fit"):
        static_check.clang_findings(row_sum())
