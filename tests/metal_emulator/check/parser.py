"""What clang says about a kernel's text, read as C++ against the declarations beside this file.

In: the text of one kernel. Out: findings, `line N: what`. Address spaces are real, so a pointer that changes its own
is an error; what C++ cannot express, such as the word `thread`, is looked for in clang's tree. Knows neither values
nor launches, and has no linker: libclang parses in this process and writes no file.
"""

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.metal_emulator.check.source import ATTRIBUTE, COMMENT, blank, mlx_include

DECLARATIONS = Path(__file__).parent
KERNEL_FILE = "kernel.metal"

CLANG_FLAGS = (
    "-xc++",
    # One target wherever this runs, with a 64-bit long and no header of the machine's own.
    "--target=x86_64-linux-gnu",
    "-nostdinc",
    "-std=c++17",
    "-fsyntax-only",
    "-ferror-limit=0",
    "-Wuninitialized",
    "-Wsometimes-uninitialized",
    # Shows where a float becomes a bfloat; the rest of what it says is dropped below. An integer may become one.
    "-Wimplicit-float-conversion",
    "-Wno-implicit-int-float-conversion",
    "-Wno-ignored-attributes",
    "-Wno-unknown-attributes",
    "-Wno-duplicate-decl-specifier",
    # Declarations have no bodies.
    "-Wno-undefined-inline",
    "-Wno-undefined-internal",
    # 0.5 is a float in Metal, which has no double.
    "-Xclang",
    "-cl-single-precision-constant",
)

# The standard headers that MLX's kernels include. metal_check.h, read before the text, declares all of them.
METAL_HEADERS = """
metal_array metal_atomic metal_common metal_compute metal_geometric metal_integer metal_limits metal_logging metal_math
metal_relational metal_simdgroup metal_simdgroup_matrix metal_stdlib metal_type_traits metal_types metal_uniform
""".split()

VECTOR = r"(?:(?:metal::)?vec\s*<[^<>;()]+>|\b(?:bool|u?(?:char|short|int|long)|b?float|half)[234]\b)"
# `vec<T, 4>(x)`, `static_cast<float4>(x)` and `float4 v(x, y);`: clang's vectors have no constructors,
# check/vectors.h has. (`float4(x)` is a macro.)
VECTOR_CONSTRUCTION = re.compile(
    rf"\b((?:metal::)?vec\s*<[^<>;()]+>)\s*(?=\()|\bstatic_cast\s*<\s*({VECTOR})\s*>\s*(?=\()"
)
VECTOR_VARIABLE = re.compile(
    rf"""
    (?<=[;{{}}])(\s*(?:const\s+)?(?P<type>{VECTOR})\s+\w+)\s*
    (?=\((?!\s*(?:const\s+)?[\w:]+\s+\w)   # a value, not a parameter: no function
       (?:[^();]|\((?:[^();]|\([^();]*\))*\))+\)\s*;)
    """,
    re.VERBOSE,
)

# A variable in threadgroup memory, not a pointer or a parameter. C++ wants `static` before the address space.
THREADGROUP_VARIABLE = re.compile(
    r"""(?<=[;{}])(\s*(?:alignas\s*\([^()]*\)\s*)?)
        (?=threadgroup\s+
           (?:(?:volatile|typename)\s+)*
           [\w:]+(?:\s*<[^;{}()]*>(?:::\w+)*)?   # its type
           \s+\w+\s*[\[;,]             # its name, and what cannot follow a pointer's
        )""",
    re.VERBOSE,
)

# An array parameter: to clang its address space would be that of the parameter itself.
ARRAY_PARAMETER = re.compile(r"(\b(?:device|constant|threadgroup)\s+(?:const\s+)?[\w:]+)\s+(\w+)\s*\[\w*\](?=\s*[,)])")

# 1.0h and 1.0bf
LITERAL = re.compile(r"(?<![\w.])(\d+\.\d*(?:e[+-]?\d+)?|\.\d+(?:e[+-]?\d+)?|\d+e[+-]?\d+)(h|bf)\b", re.IGNORECASE)


def as_cpp(text: str) -> str:
    """The kernel's text as C++ for the declarations in check/; every line stays where it is."""
    text = blank(ATTRIBUTE, blank(COMMENT, text))
    text = THREADGROUP_VARIABLE.sub(r"\1static ", text)
    text = ARRAY_PARAMETER.sub(r"\1* \2", text)
    text = LITERAL.sub(lambda match: f"{'half' if match[2] in 'hH' else 'bfloat'}({match[1]}f)", text)
    text = VECTOR_VARIABLE.sub(r"\1 = metal::construct<\g<type>>", text)
    return VECTOR_CONSTRUCTION.sub(lambda match: f"metal::construct<{match[1] or match[2]}>", text)


def load_clang() -> ModuleType:
    """libclang's Python binding, from the wheel that brings the library along."""
    try:
        from clang import cindex
    except ImportError as error:
        raise RuntimeError("Checking Metal source needs libclang: pip install libclang") from error
    return cindex


def new_index() -> Any:
    """A fresh one each time: one that outlived its module would complain when Python ends."""
    cindex = load_clang()
    try:
        return cindex.Index.create()
    except cindex.LibclangError as error:
        raise RuntimeError(f"libclang does not load: pip install libclang ({error})") from error


@cache
def virtual_files() -> tuple[tuple[str, str], ...]:
    """(path, content) of files that clang is to see in place of those on disk, or of none."""
    kernels = mlx_include() / "mlx/backend/metal/kernels"
    return (
        *((str(DECLARATIONS / name), "") for name in METAL_HEADERS),
        (str(kernels / "utils.h"), ARRAY_PARAMETER.sub(r"\1* \2", (kernels / "utils.h").read_text())),
        (str(kernels / "complex.h"), (DECLARATIONS / "mlx_complex.h").read_text()),
        # Needed for Metal 3.2 only.
        (str(kernels / "logging.h"), ""),
    )


def clang_findings(text: str) -> list[str]:
    """Errors and warnings of clang, and what Metal has to say about the tree that clang has built.

    One thing is not seen: `T x = 0.5f`, T a template parameter that is bfloat, when bfloat can represent the constant.
    """
    source = as_cpp(text)
    flags = [*CLANG_FLAGS, f"-I{DECLARATIONS}", f"-I{mlx_include()}", "-include", str(DECLARATIONS / "metal_check.h")]
    unit = new_index().parse(KERNEL_FILE, args=flags, unsaved_files=[(KERNEL_FILE, source), *virtual_files()])
    findings = [described for diagnostic in unit.diagnostics if (described := describe(diagnostic))]
    globals_ = [cursor for cursor in unit.cursor.get_children() if cursor.location.file.name == KERNEL_FILE]
    cursors = [cursor for outer in globals_ for cursor in outer.walk_preorder()]
    findings += [*global_variables(globals_), *stray_threadgroup_variables(globals_, text)]
    findings += [*undeclared_spaces(cursors, source), *silent_bfloats(cursors)]
    return list(dict.fromkeys(findings))


# To half a float goes in silence, to bfloat it does not.
TO_BFLOAT = re.compile(r"to '(?:__bf16'|[^']*' \(aka '__bf16'\))")

# Metal has this cast, clang has not.
HALF_AND_BFLOAT_CAST = re.compile(r"(?=.*_Float16)(?=.*__bf16).*(?:_cast from .* is not allowed|cast from)")

METAL_WORDS = {
    "const __attribute__((address_space(2)))": "constant",
    "__attribute__((address_space(1)))": "device",
    "__attribute__((address_space(2)))": "constant",
    "__attribute__((address_space(3)))": "threadgroup",
    "address space '1'": "address space 'device'",
    "address space '2'": "address space 'constant'",
    "address space '3'": "address space 'threadgroup'",
    "generic address space": "address space 'thread'",
    "_Float16": "half",
    "__bf16": "bfloat",
}


def describe(diagnostic: Any) -> str | None:
    """One clang diagnostic as a finding; None for what Metal would accept in silence."""
    if diagnostic.severity < diagnostic.Warning:
        return None
    if HALF_AND_BFLOAT_CAST.search(diagnostic.spelling):
        return None
    narrowing = diagnostic.option == "-Wimplicit-float-conversion"
    if narrowing and not TO_BFLOAT.search(diagnostic.spelling):
        return None
    notes = list(diagnostic.children)
    places = [diagnostic.location, *(note.location for note in notes)]
    lines = [place.line for place in places if place.file and place.file.name == KERNEL_FILE]
    if not lines and diagnostic.severity < diagnostic.Error:
        return None
    if not lines:
        place = f"{diagnostic.location.file}:{diagnostic.location.line}"
        raise RuntimeError(f"The declarations in {DECLARATIONS} do not fit: {place}: {diagnostic.spelling}")
    reasons = [note.spelling for note in notes if re.match("candidate .*:", note.spelling)][:1]
    reasons += ["a bfloat wants a cast"] * narrowing
    message = "; ".join([diagnostic.spelling, *reasons])
    for clang_word, metal_word in METAL_WORDS.items():
        message = message.replace(clang_word, metal_word)
    message = re.sub(r"'(\w+)' \(aka '\1'\)", r"'\1'", message)
    return f"line {lines[0]}: {message}"


def global_variables(cursors: list[Any]) -> Iterator[str]:
    """Variables outside of functions that are not in `constant` memory."""
    what = "outside of functions there is `constant` memory only"
    for cursor in cursors:
        if cursor.kind == load_clang().CursorKind.VAR_DECL and address_space(cursor.type) != 2:
            yield f"line {cursor.location.line}: '{cursor.spelling}': {what}"


KERNEL = re.compile(r"(?:\[\[\s*kernel\b[^\]]*\]\]|\bkernel)\s+void\s+(\w+)")


def stray_threadgroup_variables(cursors: list[Any], text: str) -> Iterator[str]:
    """Threadgroup memory that a function other than a kernel declares."""
    kernels = set(KERNEL.findall(text))
    inner = (below for cursor in cursors if cursor.spelling not in kernels for below in cursor.walk_preorder())
    for cursor in inner:
        if cursor.kind == load_clang().CursorKind.VAR_DECL and address_space(cursor.type) == 3:
            yield f"line {cursor.location.line}: '{cursor.spelling}': only a kernel declares threadgroup memory"


def undeclared_spaces(cursors: list[Any], source: str) -> Iterator[str]:
    """Pointers and references that would point to `thread` memory without saying so.

    C++ has a default address space and Metal has none; so this looks for the word `thread` in the source.
    """
    kinds = load_clang().CursorKind
    casts = {kinds.CSTYLE_CAST_EXPR, kinds.CXX_STATIC_CAST_EXPR, kinds.CXX_REINTERPRET_CAST_EXPR}
    functions = {kinds.FUNCTION_DECL, kinds.FUNCTION_TEMPLATE, kinds.CXX_METHOD}
    typed = {kinds.VAR_DECL, kinds.PARM_DECL, kinds.FIELD_DECL, *casts, *functions}
    for cursor in cursors:
        if cursor.kind not in typed:
            continue
        declared = (cursor.result_type if cursor.kind in functions else cursor.type).get_canonical()
        pointee = declared.get_pointee()
        if not pointee.spelling or address_space(pointee):
            continue
        # A macro of the kernel's own declares it: there are no words to look at.
        if cursor.kind not in casts and cursor.extent.start.offset == cursor.location.offset:
            continue
        # MLX's own kernels pass `const device T*& x`.
        if declared.spelling.endswith("&") and pointee.get_pointee().spelling:
            continue
        if not {"thread", "auto"} & set(words_of_type(cursor, source, is_cast=cursor.kind in casts)):
            what = "pointer or reference without device, constant, threadgroup or thread"
            yield f"line {cursor.location.line}: '{cursor.spelling or cursor.type.spelling}': {what}"


def words_of_type(cursor: Any, source: str, *, is_cast: bool) -> list[str]:
    """The words before the name that a cursor declares, or in the parentheses of a cast, and the one word before that.

    `thread` is an empty macro, with which no declaration begins in clang's eyes.
    """
    start = cursor.extent.start.offset
    before = re.findall(r"\w+\s*$|$", source[:start])[0]
    end = re.compile("[)>]|$").search(source, start).start() if is_cast else cursor.location.offset
    return re.findall(r"\w+", f"{before} {source[start:end]}")


def silent_bfloats(cursors: list[Any]) -> Iterator[str]:
    """Floats that become bfloats without a cast where clang does not warn: outside of what depends on a template."""
    kinds = load_clang().CursorKind
    casts = {kinds.CSTYLE_CAST_EXPR, kinds.CXX_STATIC_CAST_EXPR, kinds.CXX_FUNCTIONAL_CAST_EXPR}
    # Below an explicit cast stands an implicit one that does the work.
    in_casts = {child.hash for cursor in cursors if cursor.kind in casts for child in cursor.get_children()}
    for cursor in cursors:
        if cursor.kind != kinds.UNEXPOSED_EXPR or cursor.hash in in_casts:
            continue
        if cursor.type.get_canonical().spelling != "__bf16":
            continue
        if [child.type.get_canonical().spelling.removeprefix("const ") for child in cursor.get_children()] == ["float"]:
            yield f"line {cursor.location.line}: a float becomes a bfloat without a cast"


def address_space(declared: Any) -> int:
    """The number of clang's address space of a type; an array's is that of its elements."""
    while (element := declared.get_array_element_type()).spelling:
        declared = element
    return int(declared.get_canonical().get_address_space())
