"""`metal_kernel`: what mx.fast.metal_kernel is, on the emulator.

In: the factory's and the call's arguments. Out: a list of mx arrays. Evaluates its inputs; runs at the call, not when
an output is evaluated, so a kernel inside mx.compile or a transformation cannot run. Arguments are checked by MLX's own
kernel object, which does so before it notices that there is no Metal.
"""

import re
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from tests.metal_emulator import buffers
from tests.metal_emulator.buffers import Buffer
from tests.metal_emulator.build import build_kernel
from tests.metal_emulator.findings import Finding, MetalCompileError
from tests.metal_emulator.launch import launch
from tests.metal_emulator.options import current
from tests.metal_emulator.signature import Signature, TemplateArguments, generate
from tests.metal_emulator.translation import translate

# Tests put the emulator in this place.
_mlx_metal_kernel = mx.fast.metal_kernel


def _static_findings(text: str) -> list[Finding]:
    # Here, so that only who checks statically needs libclang.
    from tests.metal_emulator import static_check

    found = [re.fullmatch(r"(?:line (\d+): )?(.*)", line, re.DOTALL) for line in static_check.check(text)]
    return [Finding("static check", match[2], line=int(match[1]) if match[1] else None) for match in found]


class MetalKernel:
    """One kernel; see `metal_kernel`."""

    def __init__(
        self,
        name: str,
        input_names: Sequence[str],
        output_names: Sequence[str],
        source: str,
        *,
        header: str,
        ensure_row_contiguous: bool,
        atomic_outputs: bool,
    ) -> None:
        self.name = name
        self.source = source
        self._input_names = list(input_names)
        self._output_names = list(output_names)
        self._header = header
        self._ensure_row_contiguous = ensure_row_contiguous
        self._atomic_outputs = atomic_outputs
        self._mlx_kernel = _mlx_metal_kernel(
            name, input_names, output_names, source, header, ensure_row_contiguous, atomic_outputs
        )

    def __call__(self, *args: object, **keywords: object) -> list[mx.array]:
        """inputs, output_shapes, output_dtypes, grid, threadgroup, template, init_value, verbose, stream: as MLX's."""
        self._check_as_mlx(*args, **keywords)
        return self._run(**keywords)

    def _check_as_mlx(self, *args: object, **keywords: object) -> None:
        stream = keywords.get("stream")
        device = getattr(stream, "device", stream)
        if device is not None and device == mx.cpu:
            raise ValueError("[metal_kernel] Only supports the GPU.")
        try:
            self._mlx_kernel(*args, **keywords)
        except RuntimeError as error:
            if str(error) != "[metal_kernel] No Metal back-end.":
                raise

    def _run(
        self,
        *,
        inputs: Sequence[object],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        template: TemplateArguments | None = None,
        init_value: float | None = None,
        verbose: bool = False,
        stream: object = None,
    ) -> list[mx.array]:
        options = current()
        arrays = [value if isinstance(value, mx.array) else mx.array(value) for value in inputs]
        if mx.float64 in [*output_dtypes, *(array.dtype for array in arrays)]:
            raise ValueError("float64 is not supported on the GPU")
        signature = generate(
            self.name,
            self._input_names,
            self._output_names,
            self.source,
            header=self._header,
            atomic_outputs=self._atomic_outputs,
            inputs=arrays,
            output_dtypes=output_dtypes,
            template=template,
        )
        if verbose:
            print(f"Generated source code for `{self.name}`:\n```\n{signature.text}\n```")
        if options.static_check and (findings := _static_findings(signature.text)):
            raise MetalCompileError(self.name, findings, signature.text)
        library, compile_s = build_kernel(self.name, translate(signature), signature.text, options)
        outputs = [
            buffers.output_buffer(name, shape, dtype, init_value)
            for name, shape, dtype in zip(self._output_names, output_shapes, output_dtypes)
        ]
        launch(
            self.name,
            library,
            self._input_buffers(signature, arrays) + outputs,
            grid=grid,
            threadgroup=threadgroup,
            options=options,
            text=signature.text,
            compile_s=compile_s,
        )
        return [buffers.to_array(*output) for output in zip(outputs, output_shapes, output_dtypes)]

    def _input_buffers(self, signature: Signature, arrays: Sequence[mx.array]) -> list[Buffer]:
        """In the order of the signature."""
        described: dict[tuple[str, str], Buffer] = {}
        for name, array in zip(self._input_names, arrays):
            if self._ensure_row_contiguous:
                buffer, strides = buffers.input_buffer(name, array), buffers.row_contiguous_strides(array.shape)
            else:
                buffer, strides = buffers.strided_input_buffer(name, array)
            described[name, "input"] = buffer
            described[name, "shape"] = buffers.values_buffer(f"{name}_shape", array.shape, np.int32)
            described[name, "strides"] = buffers.values_buffer(f"{name}_strides", strides, np.int64)
            described[name, "ndim"] = buffers.values_buffer(f"{name}_ndim", [array.ndim], np.int32)
        return [described[p.array, p.role] for p in signature.parameters if p.role != "output"]


def metal_kernel(
    name: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    source: str,
    header: str = "",
    ensure_row_contiguous: bool = True,
    atomic_outputs: bool = False,
) -> MetalKernel:
    """A kernel that is called as mx.fast.metal_kernel's and runs on the emulator, under the options in force then.

    MetalCompileError: the static check or the compiler does not take the text. MetalEmulatorError: it did something
    wrong. ValueError and TypeError: as MLX.
    """
    return MetalKernel(
        name,
        input_names,
        output_names,
        source,
        header=header,
        ensure_row_contiguous=ensure_row_contiguous,
        atomic_outputs=atomic_outputs,
    )
