"""A kernel's text as both the parser and the rules look at it, and the place of the kernels that MLX ships.

In: Metal text. Out: the same text, position for position, without what is no code. Knows no grammar.
"""

import importlib.util
import re
from functools import cache
from pathlib import Path

COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
ATTRIBUTE = re.compile(r"\[\[.*?\]\]", re.DOTALL)
STRING = re.compile(r'"(?:\\.|[^"\\\n])*"')


def blank(pattern: re.Pattern[str], text: str) -> str:
    """`text` with spaces in place of every match, so that positions and line numbers stay."""
    return pattern.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)


def finding(text: str, position: int, what: str) -> str:
    return f"line {text.count(chr(10), 0, position) + 1}: {what}"


def only_code(text: str) -> str:
    """`text` without comments, attributes and what stands in strings."""
    return blank(STRING, blank(ATTRIBUTE, blank(COMMENT, text)))


@cache
def mlx_include() -> Path:
    """The folder of headers in the installed MLX wheel, found without loading MLX."""
    spec = importlib.util.find_spec("mlx")
    # A namespace package: any folder named mlx on the path is a location too.
    includes = [Path(place) / "include" for place in (spec and spec.submodule_search_locations) or []]
    for include in includes:
        if (include / "mlx/backend/metal/kernels/utils.h").is_file():
            return include
    raise RuntimeError("Checking Metal source needs MLX's kernel headers: pip install 'mlx[cpu]'")
