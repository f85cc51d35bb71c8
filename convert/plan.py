"""Which tensor is written in which form: the plan of a conversion, made from names and shapes alone."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from qwen_mlx.checkpoint import CONV, ZERO_CENTRED
from qwen_mlx.convert.recipes import Form
from qwen_mlx.convert.source import Tensor
from qwen_mlx.convert.stream import Item, Output

# mlx-lm and mlx-vlm read gains in the dtype of all else, so the exact ones lie beside; these two it takes as they are.
FLOAT32 = ("A_log", "linear_attn.norm.weight")
AS_STORED = "dt_bias"
Forms = Callable[[str], Form | None]
"""The form of the module of this path; None leaves it as it is."""


@dataclass(frozen=True)
class Plan:
    """What is written of one file family, and what its config.json has to say of it."""

    items: list[Item]
    quantization: dict[str, Any] | None  # as mlx-lm writes it
    odd: list[str]  # modules that stay as they are, because their size does not divide by the group

    @property
    def nbytes(self) -> int:
        return sum(item.nbytes for item in self.items)


def plan(
    tensors: Mapping[str, Tensor], model: nn.Module, forms: Forms, dtype: mx.Dtype, prefix: str = "language_model."
) -> Plan:
    """`tensors` of a `model` (a skeleton; its weights are not looked at) under `prefix` and their names.

    Projections, embeddings and experts take the form that `forms` gives their path; all else is cast to `dtype`.
    """
    modules = {f"{path}.weight": path for path, module in model.named_modules() if hasattr(module, "to_quantized")}
    chosen = {
        prefix + path: Form(module.bits, module.group_size, module.mode)
        for path, module in model.named_modules()
        if hasattr(module, "bits")  # quantized in the source already
    }
    items, odd = [], []
    for name, found in tensors.items():
        form = forms(modules[name]) if name in modules else None
        if form is not None and found.shape[-1] % form.group_size:
            odd.append(modules[name])
            form = None
        if form is None:
            items.append(_kept(prefix, name, found, dtype))
        else:
            chosen[prefix + modules[name]] = form
            items.append(quantized(prefix + modules[name], found, form, dtype))
    return Plan(items, quantization(chosen), odd)


def quantized(path: str, found: Tensor, form: Form, dtype: mx.Dtype) -> Item:
    """The rows of a matrix as MLX packs them: weight, scales and, in the affine mode, biases."""
    *rows, size = found.shape
    affine = form.mode == "affine"
    scales = Output(f"{path}.scales", (*rows, size // form.group_size), dtype if affine else mx.uint8)
    outputs = [Output(f"{path}.weight", (*rows, size * form.bits // 32), mx.uint32), scales]
    if affine:
        outputs.append(replace(scales, name=f"{path}.biases"))
    return Item(found, tuple(outputs), partial(_pack, form, dtype))


def quantization(chosen: Mapping[str, Form]) -> dict[str, Any] | None:
    """The form of most modules, and by its path every module that has another one."""
    if not chosen:
        return None
    usual = Counter(chosen.values()).most_common(1)[0][0]
    return asdict(usual) | {path: asdict(form) for path, form in chosen.items() if form != usual}


def exact_gains(tensors: Mapping[str, Tensor], prefix: str = "language_model.") -> list[Item]:
    """The zero-centred gains once more, in float32."""
    gains = {name: found for name, found in tensors.items() if ZERO_CENTRED.search(name)}
    return [_as_is(prefix + name, found, found.shape, mx.float32) for name, found in gains.items()]


def _kept(prefix: str, name: str, found: Tensor, dtype: mx.Dtype) -> Item:
    shape = (*found.shape, 1) if name.endswith(CONV) else found.shape
    if not mx.issubdtype(found.dtype, mx.floating) or name.endswith(AS_STORED):
        dtype = found.dtype
    elif name.endswith(FLOAT32):
        dtype = mx.float32
    return _as_is(prefix + name, found, shape, dtype)


def _as_is(name: str, found: Tensor, shape: Sequence[int], dtype: mx.Dtype) -> Item:
    return Item(found, (Output(name, tuple(shape), dtype),), lambda rows: [rows])


def _pack(form: Form, dtype: mx.Dtype, rows: mx.array) -> list[mx.array]:
    return list(mx.quantize(rows.astype(dtype), form.group_size, form.bits, form.mode, stream=mx.cpu))
