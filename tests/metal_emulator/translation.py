"""The C++ translation unit of a kernel: preamble, rewritten text, and one function that calls it for one thread.

In: a `Signature`, or a header's text and the arguments as C++. Out: the source that build.py compiles. Lines of the
kernel's text keep their numbers. Knows nothing of values.
"""

from collections.abc import Iterable

from tests.metal_emulator.build import KERNEL_FILE
from tests.metal_emulator.rewrite import rewrite_threadgroup_variables
from tests.metal_emulator.signature import ATTRIBUTES, Parameter, Signature

ENTRY_POINT = "mtl_entry"

_PREAMBLE = '#include <metal_stdlib>\n#include "mlx/backend/metal/kernels/utils.h"\n'
_ALIASES = {"grid_size": "threads_per_grid"}
_SIMD_WIDTHS = ("threads_per_simdgroup", "thread_execution_width")


def attribute_argument(attribute: str) -> str:
    """The C++ expression for an attribute of the running thread."""
    if attribute in _SIMD_WIDTHS:
        return "32u"
    field = f"ids->{_ALIASES.get(attribute, attribute)}"
    return f"uint3({field}[0], {field}[1], {field}[2])" if ATTRIBUTES[attribute] == "uint3" else field


def _buffer_argument(index: int, parameter: Parameter) -> str:
    qualifier = "" if parameter.role == "output" else "const "
    pointer = f"({qualifier}{parameter.type_name}*)buffers[{index}]"
    return f"*{pointer}" if parameter.is_reference else pointer


def translate_text(text: str, instance: str, arguments: Iterable[str]) -> str:
    """`text` as C++ with an entry point that calls `instance(arguments)`; they may use `buffers` and `ids`."""
    return (
        f'{_PREAMBLE}#line 1 "{KERNEL_FILE}"\n{rewrite_threadgroup_variables(text)}\n'
        f'#line 1 "entry"\nextern "C" MTL_EXPORT MTL_NOSAN void {ENTRY_POINT}(void** buffers, const mtl_ids* ids) {{\n'
        f"  {instance}({', '.join(arguments)});\n}}\n"
    )


def translate(signature: Signature) -> str:
    """The kernel of mx.fast.metal_kernel as C++."""
    buffers = [_buffer_argument(index, parameter) for index, parameter in enumerate(signature.parameters)]
    attributes = [attribute_argument(attribute) for attribute in signature.attributes]
    return translate_text(signature.definition, signature.instance, buffers + attributes)
