"""Sources of the Metal kernels, one operation a file. Imports nothing of the package, not even MLX."""

from functools import cache
from pathlib import Path


@cache
def source(name: str) -> str:
    """The text of `name`.metal: what `mx.fast.metal_kernel` takes as the body of a kernel."""
    return Path(__file__).with_name(f"{name}.metal").read_text(encoding="utf-8")
