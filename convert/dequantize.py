"""An MLX checkpoint that is quantized, as one that is not."""

from collections.abc import Mapping

import mlx.core as mx
import mlx.nn as nn

from qwen_mlx.convert.source import Tensor


def is_quantized(model: nn.Module) -> bool:
    return any(hasattr(module, "bits") for _, module in model.named_modules())


def dequantized(tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """`tensors` of `model`, whose layers have their quantized form, with every packed matrix as float32 rows."""
    found = dict(tensors)
    for path, layer in model.named_modules():
        if hasattr(layer, "bits"):
            packed, scales = found.pop(f"{path}.weight"), found.pop(f"{path}.scales")
            found[f"{path}.weight"] = _unpacked(packed, scales, found.pop(f"{path}.biases", None), layer)
    return found


def _unpacked(packed: Tensor, scales: Tensor, biases: Tensor | None, layer: nn.Module) -> Tensor:
    def rows(start: int, stop: int) -> mx.array:
        weight, scale = packed.rows(start, stop), scales.rows(start, stop)
        bias = None
        if biases is not None:  # MLX computes in the dtype of the scales
            scale, bias = scale.astype(mx.float32), biases.rows(start, stop).astype(mx.float32)
        return mx.dequantize(
            weight, scale, bias, layer.group_size, layer.bits, layer.mode, dtype=mx.float32, stream=mx.cpu
        )

    return Tensor((*packed.shape[:-1], packed.shape[-1] * 32 // layer.bits), mx.float32, rows)
