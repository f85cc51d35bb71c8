"""How many kernels a decoded token launches on Metal, counted in the graph that MLX would run, on any machine.

What is one launch there (kernels, norms, rotations, attention, dequantized rows) is one primitive of the graph that
nothing else uses here, made by the cheapest call there is, as `benchmarks/host_time.py` times the making. Weights and
states have their shapes and no contents: nothing is read, nothing computed. Views are no launches; a concatenation is
one for each of its parts, and a write at an offset that is an array is two, as the address is computed on the device.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from qwen_mlx.cache.kv import SLAB, KVCache
from qwen_mlx.cache.sequence import SequenceCache
from qwen_mlx.config import TextConfig
from qwen_mlx.kernels import backend
from qwen_mlx.kernels.backend import Kernel
from qwen_mlx.model.projection import JointProjection
from qwen_mlx.model.qwen import Qwen
from qwen_mlx.model.step import CompiledStep

# Contiguous: what mlx-lm asks it of is contiguous already, and keeps its buffer.
VIEWS = set(
    "AsStrided Broadcast BroadcastAxes Contiguous ExpandDims Flatten NumberOfElements Reshape Slice Split Squeeze "
    "StopGradient Transpose Unflatten View".split()
)
# What a primitive of the graph is to the reader.
NAMES = {
    "CumSum": "norm",
    "CumProd": "rotation",
    "CumMax": "attention",
    "CumMin": "dequantized rows",
    "Depends": "own kernel",
    "QuantizedMatmul": "matmul",
    "Matmul": "matmul",
    "GatherQMM": "matmul of experts",
    "GatherMM": "matmul of experts",
    "DynamicSliceUpdate": "write of keys and values",
    "SliceUpdate": "write of keys and values",
}


def count_step(model: Qwen, layers: Sequence[int] | None = None) -> Counter[str]:
    """Launches by name of a decoded token through `model`, greedily sampled; through these of its layers, if given.

    `model` has lost its weights afterwards.
    """
    hollow_out_ours(model)
    all_layers, kinds = model.model.layers, model.config.text.layer_types
    places = range(len(all_layers)) if layers is None else layers
    model.model.layers = [all_layers[i] for i in places]
    try:
        with stand_ins():
            cache = hollow_cache(model, places)
            logits, _ = CompiledStep(model._forward, [kinds[i] for i in places])(token(), cache)
            return launches([mx.argmax(logits[:, -1], axis=-1), *cache.arrays])
    finally:
        model.model.layers = all_layers


def launches(outputs: Sequence[mx.array]) -> Counter[str]:
    """What MLX would launch for `outputs` from what is evaluated already."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "graph.dot"
        mx.export_to_dot(str(path), *outputs)
        graph = path.read_text()
    found: Counter[str] = Counter()
    for box, primitive in re.findall(r'(\S+) \[label ="([A-Za-z]\w*)[^"]*", shape=rectangle', graph):
        if primitive not in VIEWS:
            parts = 2 if primitive == "DynamicSliceUpdate" else 1
            if primitive == "Concatenate":
                parts = len(re.findall(rf"-> {box}\b", graph))
            found["fused elementwise" if primitive.startswith("Compiled") else NAMES.get(primitive, primitive)] += parts
    # What stands for these two takes a Depends of its own.
    return found - Counter({"own kernel": found["attention"] + found["dequantized rows"]})


def hollow(shape: Sequence[int], dtype: mx.Dtype) -> mx.array:
    """Zeros that take no memory, evaluated."""
    zeros = mx.broadcast_to(mx.zeros((), dtype), tuple(shape))
    mx.eval(zeros)
    return zeros


def hollow_out(model: nn.Module) -> None:
    """Take the contents of all weights away; in lazy ones they were never there."""
    model.update(tree_map(lambda array: hollow(array.shape, array.dtype), model.parameters()))


def hollow_out_ours(model: Qwen) -> None:
    """The same for ours, joint projections included."""
    hollow_out(model)
    for joint in (value for module in model.modules() for value in vars(module).values()):
        if isinstance(joint, JointProjection) and joint.fused is not None:
            hollow_out(joint.fused)


def token() -> mx.array:
    return hollow((1, 1), mx.uint32)


def hollow_cache(model: Qwen, places: Sequence[int]) -> SequenceCache:
    whole, text = model.make_cache(), model.config.text
    for layer in whole.layers:
        if isinstance(layer, KVCache):
            layer.slab, layer.offset = hollow((2, *hollow_heads(text)), model.dtype), 1
        else:
            layer.conv_state, layer.recurrent_state = hollow_states(text, model.dtype)
    return SequenceCache([whole.layers[i] for i in places])


def hollow_heads(text: TextConfig) -> tuple[int, int, int, int]:
    """Shape of the first slab of keys, or of values."""
    return 1, text.num_key_value_heads, SLAB, text.head_dim


def hollow_states(text: TextConfig, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    """conv_state and recurrent_state of one Gated DeltaNet layer."""
    heads = (text.linear_num_value_heads, text.linear_value_head_dim, text.linear_key_head_dim)
    channels = 2 * text.linear_num_key_heads * heads[2] + heads[0] * heads[1]
    return hollow((1, text.linear_conv_kernel_dim - 1, channels), dtype), hollow((1, *heads), mx.float32)


@contextmanager
def stand_ins() -> Iterator[None]:
    """Metal seems to be there, and everything that is one launch on it is one primitive of the graph."""
    replaced = {"rms_norm": _norm, "rope": _rope, "scaled_dot_product_attention": _attention}
    with ExitStack() as stack:
        stack.enter_context(patch.object(backend, "gpu_generation", lambda: 16))
        stack.enter_context(patch.object(Kernel, "__call__", _launch))
        stack.enter_context(patch.object(mx, "dequantize", _dequantize))
        for name, stand_in in replaced.items():
            stack.enter_context(patch.object(mx.fast, name, stand_in))
        yield


def one_launch(outputs: list[mx.array], *inputs: Any) -> list[mx.array]:
    """`outputs`, which now come from those of `inputs` that are arrays."""
    return mx.depends(outputs, [array for array in inputs if isinstance(array, mx.array)])


_zeros = cache(hollow)


def _launch(self: Kernel, *inputs: Any, outputs: Sequence[tuple[Any, mx.Dtype]], **_: Any) -> list[mx.array]:
    return one_launch([_zeros(shape, dtype) for shape, dtype in outputs], *inputs)


def _norm(x: mx.array, weight: mx.array | None, eps: float, **_: Any) -> mx.array:
    # With a wider gain, rms_norm casts x in a launch before its own.
    return mx.cumsum(x if weight is None or weight.dtype == x.dtype else x.astype(mx.float32), axis=-1)


def _rope(x: mx.array, *_: Any, **__: Any) -> mx.array:
    return mx.cumprod(x, axis=-1)


def _attention(q: mx.array, k: mx.array, v: mx.array, *, mask: Any = None, **_: Any) -> mx.array:
    return mx.cummax(one_launch([q], k, v, mask)[0], axis=-1)


def _dequantize(packed: mx.array, scales: mx.array, *others: Any, bits: int = 4, **named: Any) -> mx.array:
    shape = (*packed.shape[:-1], packed.shape[-1] * 32 // bits)
    dtype = mx.bfloat16 if scales.dtype == mx.uint8 else scales.dtype
    return mx.cummin(one_launch([_zeros(shape, dtype)], packed, scales, *others, *named.values())[0], axis=-1)
