"""Finds what the Metal compiler would refuse, by reading a kernel's text only.

In comes the whole text that `mx.fast.metal_kernel` generates for one kernel: header, signature with `[[attributes]]`,
body, explicit instantiation. Out comes a list of findings, each `line N: what`, empty when there is nothing to say.

`check` is the union of three layers: `clang_findings` parses the text as C++ with real address spaces, `lint` knows
what Metal forbids and C++ allows, `unknown_names` doubts every function that no kernel shipped with MLX calls. None of
them knows what a kernel computes, how it is launched, or whether Apple's compiler agrees: no finding is no promise.
"""

import re
from functools import cache, lru_cache

from tests.metal_emulator.check.parser import clang_findings
from tests.metal_emulator.check.source import COMMENT, blank, finding, mlx_include, only_code

__all__ = ["check", "clang_findings", "lint", "unknown_names"]


def check(text: str) -> list[str]:
    """All findings on the text of one kernel, in the order of its lines."""
    return list(_check(text))


@lru_cache(maxsize=512)
def _check(text: str) -> tuple[str, ...]:
    findings = [*clang_findings(text), *lint(text), *unknown_names(text)]
    return tuple(sorted(dict.fromkeys(findings), key=lambda finding: int(finding.split()[1].rstrip(":"))))


# (pattern, reason): each match in the text, without its comments, strings and attributes, is a finding.
RULES = [
    (re.compile(r"\bdouble\b"), "Metal has no double"),
    (re.compile(r"\bstd\s*::"), "Metal has no std::, its library is in metal::"),
    # A `[` that subscripts nothing opens a lambda. MLX avoids them too: the compiler of macOS 14 has none.
    (re.compile(r"(?:(?<=[^\w\s)\]>])|(?<=\breturn))\s*\[[^\[\]]*\](?=\s*[({])"), "a lambda needs Metal 3.2"),
    (re.compile(r"\bgoto\b"), "Metal has no goto"),
    (re.compile(r"\b(?:try|catch|throw)\b"), "Metal has no exceptions"),
    (re.compile(r"\b(?:new|delete)\b(?!\s*;)"), "Metal has no heap"),
    (re.compile(r"\b(?:dynamic_cast|typeid)\b"), "Metal has no run-time type information"),
    (re.compile(r"\bvirtual\b"), "Metal has no virtual functions"),
    (re.compile(r"\b(?:thread_local|co_await|co_yield|co_return)\b"), "not in Metal"),
    (re.compile(r"\b(?:asm|__asm__)\b"), "Metal has no inline assembly"),
    (re.compile(r"\b__int128(?:_t)?\b"), "Metal has no 128-bit integers"),
    (re.compile(r"\b__builtin_\w+"), "a built-in of clang, not of Metal"),
    (re.compile(r"\bf?printf\b"), "Metal 3.1 prints nothing"),
    (re.compile(r"#\s*include\b(?!\s*<metal)"), "no file but Metal's own headers is there at run time"),
    (re.compile(r"\b(?:wchar_t|long\s+long)\b"), "not a type of Metal"),
]


def lint(text: str) -> list[str]:
    """What Metal forbids and C++ allows."""
    code = only_code(text)
    matches = [(match, reason) for pattern, reason in RULES for match in pattern.finditer(code)]
    return [finding(code, match.end() - 1, f"'{match[0].strip()}': {reason}") for match, reason in matches]


# Not after a dot or an arrow: a member is its type's own affair.
CALL = re.compile(r"(?<![\w.])(?<!->)([A-Za-z_]\w*)\s*(?:<[^<>;(){}]*>)?\s*\(")
# A name before a parameter list and a body, or an initializer list and a body.
DEFINITION = re.compile(
    r"\b([A-Za-z_]\w*)\s*\((?:[^;{}()]|\([^;{}()]*\))*\)\s*(?:const\s*)?(?:thread\s*)?(?::[^;{}]*)?\{"
)
TYPE_NAME = re.compile(r"\b(?:typename|class|struct|using|define|typedef[^;]*?)\s+(\w+)")
# A name after a type, as in `half2 scale(x, y);`
DECLARATION = re.compile(r"\b(?!(?:return|else|do|case)\b)[A-Za-z_][\w:]*(?:\s*<[^<>;(){}]*>)?\s+(\w+)\s*\(")

KEYWORDS = set(
    """if for while switch return sizeof alignof alignas static_cast reinterpret_cast const_cast static_assert decltype
    template constexpr using else case do and or not operator""".split()
)
SCALARS = "bool char uchar short ushort int uint long ulong half float bfloat".split()
TYPES = {f"{scalar}{size}" for scalar in [*SCALARS, "packed_float", "packed_half"] for size in ("", 2, 3, 4)}
TYPES |= {f"{sign}int{bits}_t" for sign in ("", "u") for bits in (8, 16, 32, 64)}
TYPES |= {"bfloat16_t", "float16_t", "size_t", "vec", "device", "constant", "threadgroup", "thread"}


@cache
def names_in_mlx() -> frozenset[str]:
    """Everything called or defined in the kernels that MLX ships, without those for Metal 4's matrix units (NAX)."""
    kernels = mlx_include() / "mlx/backend/metal/kernels"
    sources = [path for path in kernels.rglob("*") if path.suffix in {".h", ".metal"} and "nax" not in path.name]
    return frozenset(name for path in sources for name in CALL.findall(blank(COMMENT, path.read_text())))


def unknown_names(text: str) -> list[str]:
    """Functions called in the text that are neither defined in it nor called in any kernel of MLX's own."""
    code = only_code(text)
    own = {name for pattern in (DEFINITION, DECLARATION, TYPE_NAME) for name in pattern.findall(code)}
    known = KEYWORDS | TYPES | own | names_in_mlx()
    first = {match[1]: match.start() for match in reversed(list(CALL.finditer(code)))}
    what = "no kernel of MLX calls it, so nothing shows that every Mac has it"
    return [finding(code, place, f"'{name}': {what}") for name, place in first.items() if name not in known]
