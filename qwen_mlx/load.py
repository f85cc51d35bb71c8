"""A path or hub id to a model that is ready to run, and its tokenizer."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from qwen_mlx.checkpoint import open_checkpoint, some
from qwen_mlx.config import TextConfig, read_config
from qwen_mlx.errors import CheckpointError
from qwen_mlx.hub import resolve
from qwen_mlx.kernels.backend import gpu_generation
from qwen_mlx.kernels.random_inputs import AttentionSizes, Sizes
from qwen_mlx.kernels.self_check import check_kernels
from qwen_mlx.model.projection import fuse_projections
from qwen_mlx.model.qwen import Qwen
from qwen_mlx.tokenizer import Tokenizer

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
# Rounding one of these to 16 bits moves the logits more than everything else that is rounded.
ALWAYS_FLOAT32 = ("norm.weight", "norm_embedding.weight", "norm_hidden.weight", "A_log", "dt_bias")
MODES = {(32, 4): "mxfp4", (32, 8): "mxfp8", (16, 4): "nvfp4"}  # (group size, bits) of the formats without biases
LARGEST_FLOAT16 = 65504.0


def load(path_or_repo: str | Path, *, revision: str | None = None, dtype: str = "auto") -> tuple[Qwen, Tokenizer]:
    """Load a model folder, a hub repository, or the embedded "demo": released, MLX and qwen_mlx layouts alike.

    `dtype` of the activations and unquantized weights: "float32", "bfloat16", "float16", or "auto": bfloat16 on M3 and
    later, float16 on M1 and M2 (which have no native bfloat16), float32 without Metal. Gains, gates and recurrent
    states are float32 always. Weights are read from disk when they are first used; float16 alone reads the wider ones
    at once, to see that they fit.

    Raises `ModelNotFoundError`, `CheckpointError`, `TokenizerError`; ValueError for an unknown dtype.
    """
    folder = resolve(path_or_repo, revision=revision)
    return load_model(folder, dtype=dtype), Tokenizer.load(folder)


def load_model(folder: Path, *, dtype: str = "auto") -> Qwen:
    """The model of `folder` alone; see `load`."""
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"dtype must be auto, {', '.join(DTYPES)}, not {dtype!r}.")
    config = read_config(folder)
    tensors = open_checkpoint(folder).tensors()
    if config.text.tie_word_embeddings:
        # Some tied releases store the head a second time.
        tensors = {name: array for name, array in tensors.items() if not name.startswith("lm_head.")}
    model = Qwen(config)
    quantize_like(folder, model, tensors)
    check_tensors(folder, model, tensors)
    model.dtype, model.folder = _choose_dtype(folder, dtype, tensors), folder.absolute()
    set_weights(model, tensors, model.dtype)
    check_kernels(*kernel_sizes(config.text, model.dtype))
    return model


def kernel_sizes(config: TextConfig, dtype: mx.Dtype) -> tuple[Sizes, AttentionSizes]:
    """Those that decide which kernels serve: of Gated DeltaNet layers, and of full attention."""
    linear = Sizes(
        config.linear_num_key_heads,
        config.linear_num_value_heads,
        config.linear_key_head_dim,
        config.linear_value_head_dim,
        config.linear_conv_kernel_dim,
        dtype,
    )
    full = AttentionSizes(
        config.hidden_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        config.rotary_dim,
        dtype,
    )
    return linear, full


def weights_with_nan(model: Qwen) -> list[str]:
    """Names of the weights that hold NaN or infinity; reads all of them."""
    weights = parameters(model).items()
    return [n for n, a in weights if mx.issubdtype(a.dtype, mx.floating) and not mx.isfinite(a).all().item()]


class Described(Protocol):
    """An array, or a tensor of which no more than this is known yet."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> mx.Dtype: ...
    @property
    def ndim(self) -> int: ...


def quantize_like(place: Path | str, model: nn.Module, tensors: Mapping[str, Described]) -> None:
    """Give every layer that has scales the quantized form its tensors show: bits and group size follow from shapes."""

    def form(path: str, module: nn.Module) -> bool | dict[str, Any]:
        scales, packed = tensors.get(f"{path}.scales"), tensors.get(f"{path}.weight")
        if scales is None or packed is None or min(scales.ndim, packed.ndim) < 2 or not hasattr(module, "to_quantized"):
            return False
        size = module.weight.shape[-1]
        bits, rest = divmod(32 * packed.shape[-1], size)
        group_size = size // max(scales.shape[-1], 1)
        affine = f"{path}.biases" in tensors
        mode = "affine" if affine else MODES.get((group_size, bits))
        known = group_size in (32, 64, 128) and bits in (2, 3, 4, 5, 6, 8) if affine else mode is not None
        if not known or rest or size % group_size:
            raise CheckpointError(
                f"{place}: {path} is quantized in a way MLX does not know: {bits} bits in groups of {group_size}, "
                f"{'with' if affine else 'without'} biases."
            )
        return {"group_size": group_size, "bits": bits, "mode": mode}

    nn.quantize(model, class_predicate=form)


def check_tensors(place: Path | str, model: nn.Module, tensors: Mapping[str, Described]) -> None:
    """`CheckpointError` where `tensors`, found in `place`, are not the weights of `model`: names, shapes, kinds."""
    expected = parameters(model)
    if missing := expected.keys() - tensors.keys():
        raise CheckpointError(f"{place} lacks {some(missing)}; download or convert the model again.")
    if extra := tensors.keys() - expected.keys():
        raise CheckpointError(f"{place} holds tensors that its config.json does not speak of: {some(extra)}.")
    for name, wanted in expected.items():
        found = tensors[name]
        if found.shape != wanted.shape:
            raise CheckpointError(
                f"{place}: {name} has shape {found.shape}, config.json asks for {wanted.shape}; take both files from "
                "one release."
            )
        # Where floats are wanted any kind is read; packed weights and their scales are what they are.
        if found.dtype != wanted.dtype and not all(mx.issubdtype(d, mx.floating) for d in (found.dtype, wanted.dtype)):
            raise CheckpointError(
                f"{place}: {name} is stored as {found.dtype}, where {wanted.dtype} is wanted; take the unquantized "
                "release or an MLX conversion."
            )


def set_weights(model: nn.Module, tensors: dict[str, mx.array], dtype: mx.Dtype) -> None:
    """`tensors` become the weights of `model`, in `dtype` but for what is float32 always."""
    for name, array in tensors.items():
        if mx.issubdtype(array.dtype, mx.floating):
            tensors[name] = array.astype(mx.float32 if name.endswith(ALWAYS_FLOAT32) else dtype)
    model.load_weights(list(tensors.items()))
    model.eval()
    if gpu_generation() is not None:  # on a CPU a launch costs nothing, and wider matmuls are no faster
        fuse_projections(model)


def parameters(model: nn.Module) -> dict[str, mx.array]:
    flat = tree_flatten(model.parameters(), destination={})
    assert isinstance(flat, dict)
    return flat


def _choose_dtype(folder: Path, dtype: str, tensors: dict[str, mx.array]) -> mx.Dtype:
    chosen = DTYPES[auto_dtype(gpu_generation()) if dtype == "auto" else dtype]
    if chosen == mx.float16 and (large := too_large_for_float16(tensors)):
        if dtype != "auto":
            raise CheckpointError(f"{folder} does not fit float16: {some(large)} exceed 65504; use bfloat16.")
        warnings.warn(f"{some(large)} exceed float16's 65504; running in bfloat16 instead.", stacklevel=3)
        return mx.bfloat16
    return chosen


def auto_dtype(generation: int | None) -> str:
    """The dtype for an Apple GPU of this generation; None is a machine without Metal."""
    if generation is None:
        return "float32"  # the CPU's bfloat16 matmul is an order of magnitude slower
    return "bfloat16" if generation >= 15 else "float16"


def too_large_for_float16(tensors: dict[str, mx.array]) -> list[str]:
    """Names of the tensors that hold a value beyond 65504, which would become infinity; reads all that may."""
    wide = {n: a for n, a in tensors.items() if a.dtype in (mx.bfloat16, mx.float32) and not n.endswith(ALWAYS_FLOAT32)}
    return [name for name, array in wide.items() if (mx.max(mx.abs(array)) > LARGEST_FLOAT16).item()]
