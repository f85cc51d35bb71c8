"""Kernels that MLX ships as headers, run on the emulator: whole kernels with a signature of their own.

In: the names of headers below mlx/backend/metal/kernels, the instance to call and its arguments. Out: the arrays that
the kernel wrote. Neither generates nor checks a text; knows nothing of any one kernel.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from tests.metal_emulator import buffers, build
from tests.metal_emulator.launch import launch
from tests.metal_emulator.options import current
from tests.metal_emulator.translation import attribute_argument, translate_text

KERNELS = "mlx/backend/metal/kernels"
# utils.h and what it includes stand in front of every kernel.
_PREAMBLE = {"utils.h", "bf16.h", "bf16_math.h", "complex.h", "defines.h", "logging.h"}


@dataclass(frozen=True)
class Input:
    """declaration: "const float*", "const int&", ...; value: an array, or the bytes of a struct as uint8."""

    name: str
    declaration: str
    value: mx.array | np.ndarray


@dataclass(frozen=True)
class Output:
    """declaration: "float*", ...; every element must be written unless there is an init_value."""

    name: str
    declaration: str
    shape: tuple[int, ...]
    dtype: mx.Dtype
    init_value: float | None = None


def flatten(headers: Sequence[str]) -> str:
    """The text of the headers with MLX's own includes in their place, each once."""
    seen = set(_PREAMBLE)

    def lines_of(header: str) -> list[str]:
        if header in seen:
            return []
        seen.add(header)
        overriding = build.SHIM / KERNELS / header
        path = overriding if overriding.exists() else build.mlx_include() / KERNELS / header
        lines: list[str] = []
        for line in path.read_text().splitlines():
            include = re.match(rf'\s*#include "{KERNELS}/([^"]+)"', line)
            if include:
                lines += lines_of(include[1])
            elif line.strip() != "#pragma once":
                lines.append(line)
        return lines

    return "\n".join(line for header in headers for line in lines_of(header)) + "\n"


def _argument(index: int, declaration: str) -> str:
    pointer = f"({declaration.rstrip('*&')}*)buffers[{index}]"
    return f"*{pointer}" if declaration.endswith("&") else pointer


def _buffer(argument: Input | Output) -> buffers.Buffer:
    if isinstance(argument, Output):
        return buffers.output_buffer(argument.name, argument.shape, argument.dtype, argument.init_value)
    if isinstance(argument.value, np.ndarray):
        return buffers.Buffer(argument.name, argument.value)
    return buffers.input_buffer(argument.name, argument.value)


def run_header_kernel(
    headers: Sequence[str],
    instance: str,
    arguments: Sequence[Input | Output],
    *,
    attributes: Sequence[str],
    grid: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
    function_constants: Mapping[str, tuple[type, object]] | None = None,
    edit: Callable[[str], str] = str,
) -> list[mx.array]:
    """Runs `instance` on the buffers and attributes of its signature, in order; the outputs, in order.

    edit: changes the text first. function_constants: as for `launch`.
    """
    text = edit(flatten(headers))
    expressions = [_argument(index, argument.declaration) for index, argument in enumerate(arguments)]
    expressions += map(attribute_argument, attributes)
    name = instance.split("<")[0]
    options = current()
    library, compile_s = build.build_kernel(name, translate_text(text, instance, expressions), text, options)
    bound = [_buffer(argument) for argument in arguments]
    launch(
        name,
        library,
        bound,
        grid=grid,
        threadgroup=threadgroup,
        options=options,
        text=text,
        compile_s=compile_s,
        function_constants=function_constants,
    )
    pairs = zip(arguments, bound)
    return [buffers.to_array(buffer, out.shape, out.dtype) for out, buffer in pairs if isinstance(out, Output)]
