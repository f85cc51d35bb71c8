"""Metal or plain MLX: decided here once, from the machine this runs on; the one place that looks up `metal_kernel`."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any

import mlx.core as mx

from qwen_mlx.metal import source

SIMD_WIDTH = 32
distrusted: set[str] = set()
"""Labels of kernels that gave a wrong result on this machine; plain MLX does their work."""


@cache
def gpu_generation() -> int | None:
    """The generation of the Apple GPU (13 is M1, 14 M2, 15 M3, 16 M4), None where there is no Metal."""
    if not mx.metal.is_available() or mx.default_device() != mx.Device(mx.gpu):
        return None
    return read_generation(str(mx.device_info()["architecture"]))


def read_generation(architecture: str) -> int:
    """The number in names such as "applegpu_g13g"; a GPU that does not say (a virtual one) counts as the first."""
    number = re.match(r"applegpu_g(\d+)", architecture)
    return int(number[1]) if number else 13


def fused(function: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """`function` of elementwise operations as one launch on Metal; elsewhere, where that needs a compiler, as it is."""
    compiled = mx.compile(function, shapeless=True)

    @wraps(function)
    def call(*arrays: mx.array) -> mx.array:
        return function(*arrays) if gpu_generation() is None else compiled(*arrays)

    return call


@dataclass(frozen=True)
class Kernel:
    """The kernel of metal/`name`.metal: its arguments in order, and the names that its text tests with #ifdef."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    defines: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        return "_".join([self.name, *self.defines]).lower()

    @property
    def usable(self) -> bool:
        return gpu_generation() is not None and self.label not in distrusted

    def __call__(
        self,
        *inputs: mx.array | float,
        outputs: Sequence[tuple[tuple[int, ...], mx.Dtype]],
        grid: tuple[int, int],
        simdgroups: int = 1,
        **constants: int | mx.Dtype,
    ) -> list[mx.array]:
        """Launch `grid` (y, z) SIMD-groups, up to `simdgroups` neighbours in y to a threadgroup; `outputs` are shapes
        and dtypes, `constants` the template parameters of the text."""
        results: list[mx.array] = _build(self)(
            inputs=list(inputs),
            template=list(constants.items()),
            grid=(SIMD_WIDTH, *grid),
            threadgroup=(SIMD_WIDTH, min(simdgroups, grid[0]), 1),
            output_shapes=[shape for shape, _ in outputs],
            output_dtypes=[dtype for _, dtype in outputs],
        )
        return results


@cache
def _build(kernel: Kernel) -> Any:
    # Contiguous inputs (the default) and safe mathematics (the default: exp(-inf) is 0) are what the texts rely on.
    return mx.fast.metal_kernel(
        name=f"qwen_{kernel.label}",
        input_names=list(kernel.inputs),
        output_names=list(kernel.outputs),
        source=source(kernel.name),
        header="".join(f"#define {name}\n" for name in kernel.defines),
    )
