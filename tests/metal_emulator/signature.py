"""The Metal text that mx.fast.metal_kernel makes of a kernel's body: byte for byte, quirks included.

In: what the factory and the call were given. Out: a `Signature` with the text, the parameters in the order of their
buffers and the attributes. Follows mlx/backend/common/metal_kernel.cpp of MLX 0.32.4; test_signature.py compares.
Knows nothing of compilers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

TYPE_NAMES = {
    mx.bool_: "bool",
    mx.uint8: "uint8_t",
    mx.uint16: "uint16_t",
    mx.uint32: "uint32_t",
    mx.uint64: "uint64_t",
    mx.int8: "int8_t",
    mx.int16: "int16_t",
    mx.int32: "int32_t",
    mx.int64: "int64_t",
    mx.float16: "float16_t",
    mx.float32: "float",
    mx.bfloat16: "bfloat16_t",
    mx.complex64: "complex64_t",
}

# In MLX's order; an attribute becomes a parameter if its name occurs in the source.
ATTRIBUTES = {
    "dispatch_quadgroups_per_threadgroup": "uint",
    "dispatch_simdgroups_per_threadgroup": "uint",
    "dispatch_threads_per_threadgroup": "uint3",
    "grid_origin": "uint3",
    "grid_size": "uint3",
    "quadgroup_index_in_threadgroup": "uint",
    "quadgroups_per_threadgroup": "uint",
    "simdgroup_index_in_threadgroup": "uint",
    "simdgroups_per_threadgroup": "uint",
    "thread_execution_width": "uint",
    "thread_index_in_quadgroup": "uint",
    "thread_index_in_simdgroup": "uint",
    "thread_index_in_threadgroup": "uint",
    "thread_position_in_grid": "uint3",
    "thread_position_in_threadgroup": "uint3",
    "threadgroup_position_in_grid": "uint3",
    "threadgroups_per_grid": "uint3",
    "threads_per_grid": "uint3",
    "threads_per_simdgroup": "uint",
    "threads_per_threadgroup": "uint3",
}

# Smaller inputs are passed in the constant address space.
CONSTANT_BELOW = 8

TemplateArguments = Sequence[tuple[str, bool | int | mx.Dtype]]


@dataclass(frozen=True)
class Parameter:
    """One buffer of the kernel. `role`: "input", "shape", "strides", "ndim" (of `array`) or "output"."""

    role: str
    array: str
    type_name: str
    is_reference: bool = False

    @property
    def name(self) -> str:
        """As the source says it: x, x_shape, ..."""
        return self.array if self.role in ("input", "output") else f"{self.array}_{self.role}"


@dataclass(frozen=True)
class Signature:
    """`definition` is `text` without the instantiation of a template; `instance` names what is to be called."""

    kernel_name: str
    definition: str
    instantiation: str
    instance: str
    parameters: tuple[Parameter, ...]
    attributes: tuple[str, ...]

    @property
    def text(self) -> str:
        return self.definition + self.instantiation


def _template_argument(value: bool | int | mx.Dtype) -> tuple[str, str]:
    """(kind of parameter, value as written); bool before int, which it is as well."""
    if isinstance(value, bool):
        return "bool", str(int(value))
    if isinstance(value, int):
        return "int", str(value)
    return "typename", TYPE_NAMES[value]


def _kernel_name(name: str, template_values: str, inputs: Sequence[mx.array], output_dtypes: Sequence[mx.Dtype]) -> str:
    parts = ["custom_kernel", name]
    if template_values:
        parts.append("_" + template_values.replace(", ", "_").replace("-", "_"))
    for array in inputs:
        passed = "s" if array.ndim == 0 else "c" if array.size < CONSTANT_BELOW else ""
        parts.append(TYPE_NAMES[array.dtype] + passed)
    parts += [TYPE_NAMES[dtype] for dtype in output_dtypes]
    return "_".join(parts)


def _input_parameters(name: str, array: mx.array, source: str) -> list[Parameter]:
    parameters = [Parameter("input", name, TYPE_NAMES[array.dtype], is_reference=array.ndim == 0)]
    if array.ndim > 0:
        kinds = [("shape", "int", False), ("strides", "int64_t", False), ("ndim", "int", True)]
        parameters += [Parameter(role, name, kind, ref) for role, kind, ref in kinds if f"{name}_{role}" in source]
    return parameters


def _inputs(input_names: Sequence[str], inputs: Sequence[mx.array], source: str) -> tuple[list[Parameter], list[str]]:
    """The buffers of the inputs and their lines in the signature."""
    parameters: list[Parameter] = []
    lines: list[str] = []
    for input_name, array in zip(input_names, inputs):
        space = "constant" if array.size < CONSTANT_BELOW else "device"
        for parameter in _input_parameters(input_name, array, source):
            location = space if parameter.role == "input" else "constant"
            sign = "&" if parameter.is_reference else "*"
            declared = f"const {location} {parameter.type_name}{sign} {parameter.name}"
            lines.append(f"  {declared} [[buffer({len(parameters)})]],\n")
            parameters.append(parameter)
    return parameters, lines


def generate(
    name: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    source: str,
    *,
    header: str,
    atomic_outputs: bool,
    inputs: Sequence[mx.array],
    output_dtypes: Sequence[mx.Dtype],
    template: TemplateArguments | None,
) -> Signature:
    """The signature and text of the kernel for these arguments, which are taken to be valid."""
    arguments = [(parameter, *_template_argument(value)) for parameter, value in template or []]
    values = ", ".join(value for _, _, value in arguments)
    kernel_name = _kernel_name(name, values, inputs, output_dtypes)
    attributes = [attribute for attribute in ATTRIBUTES if attribute in source]

    parameters, lines = _inputs(input_names, inputs, source)
    for output_name, dtype in zip(output_names, output_dtypes):
        type_name = f"atomic<{TYPE_NAMES[dtype]}>" if atomic_outputs else TYPE_NAMES[dtype]
        # MLX compares the number of this buffer with the number of arrays, though shapes and strides are buffers too.
        follows = len(parameters) < len(inputs) + len(output_names) - 1 or attributes
        end = ",\n" if follows else ") {\n"
        lines.append(f"  device {type_name}* {output_name} [[buffer({len(parameters)})]]{end}")
        parameters.append(Parameter("output", output_name, type_name))
    for attribute in attributes:
        end = ",\n" if attribute != attributes[-1] else ") {\n"
        lines.append(f"  {ATTRIBUTES[attribute]} {attribute} [[{attribute}]]{end}")

    declaration = ", ".join(f"{kind} {parameter}" for parameter, kind, _ in arguments)
    opening = f"template <{declaration}>\n" if arguments else ""
    instance = f"{kernel_name}<{values}>" if arguments else kernel_name
    instantiation = f'\ntemplate [[host_name("{kernel_name}")]] [[kernel]] decltype({instance}) {instance};\n'
    return Signature(
        kernel_name=kernel_name,
        definition=f"{header}{opening}[[kernel]] void {kernel_name}(\n{''.join(lines)}{source}\n}}\n",
        instantiation=instantiation if arguments else "",
        instance=instance,
        parameters=tuple(parameters),
        attributes=tuple(attributes),
    )
