"""What a conversion reads: the tensors of a checkpoint under the names of our modules, rows at a time.

Nothing is read before it is asked for, and no more than is asked for, so a converter needs memory for a few rows.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np

from qwen_mlx.checkpoint import (
    CONV,
    INDEX,
    ZERO_CENTRED,
    Checkpoint,
    Header,
    open_checkpoint,
    some,
    unlisted_shards,
)
from qwen_mlx.config import read_json
from qwen_mlx.errors import CheckpointError
from qwen_mlx.load_mtp import GAIN, absolute_gains, find_mtp
from qwen_mlx.load_mtp import PREFIX as MTP

# As safetensors spells it: the bits as NumPy reads them, what MLX makes of them, and from which bits on, the sign
# shifted out, there is no number; integers have no such.
DTYPES = {
    "F32": (np.uint32, mx.float32, 0xFF000000),
    "F16": (np.uint16, mx.float16, 0xF800),
    "BF16": (np.uint16, mx.bfloat16, 0xFF00),
    "F8_E4M3": (np.uint8, mx.uint8, 0xFE),
    "U32": (np.uint32, mx.uint32, None),
    "U8": (np.uint8, mx.uint8, None),
}
FP8_BLOCK = 128  # rows and columns that share a scale in Qwen's FP8 releases
SCALE = "_scale_inv"
EXPERT = re.compile(r"(.*experts)\.(0|[1-9]\d{0,5})\.(\w+_proj)\.(weight(?:_scale_inv)?)$")
VISION = re.compile(r"^(model\.)?(language_model\.)?(model\.)?visual\.")
# Beside the weights: what another program, or the next conversion, may want.
COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "LICENSE*",
    "NOTICE*",
)


@dataclass(frozen=True)
class Tensor:
    """`rows(start, stop)` reads that part of the first axis, in `dtype`."""

    shape: tuple[int, ...]
    dtype: mx.Dtype
    rows: Callable[[int, int], mx.array]

    def all(self) -> mx.array:
        return self.rows(0, self.shape[0])

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def row_nbytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.size


@dataclass(frozen=True)
class Source:
    """A checkpoint of any kind. Gains are 1 + w in float32 everywhere, convolutions [Cn, K], experts apart."""

    kind: str  # "released", "FP8", "MLX", "qwen_mlx" or "GGUF"
    config: dict[str, Any]  # as in config.json
    text: dict[str, Tensor]  # `model.layers.0.mlp.up_proj.weight`, `lm_head.weight`
    mtp: dict[str, Tensor] = field(default_factory=dict)  # bare: `fc.weight`, `layers.0.self_attn.q_proj.weight`
    vision: dict[str, Tensor] = field(default_factory=dict)  # `vision_tower.*`, shapes as in the MLX layout
    files: dict[str, Path | bytes] = field(default_factory=dict)  # tokenizer, template, ...: a file, or what it holds


def open_source(folder: Path, config: dict[str, Any], *, vision: bool = True, mtp: bool = True) -> Source:
    """The checkpoint in `folder`, whose config.json is `config`: released (bfloat16 or FP8) or MLX, quantized or not.

    What is not wanted is not looked at. Raises `CheckpointError` where a file is missing, truncated, contradicts its
    index or mixes conventions.
    """
    checkpoint = open_checkpoint(folder)
    _check_index(folder, checkpoint.headers | checkpoint.others)
    text = _tensors(folder, _once(folder, ((checkpoint.names[n], header) for n, header in checkpoint.headers.items())))
    text |= _gains(checkpoint, text)
    tower = {name: header for name, header in checkpoint.others.items() if vision and not MTP.match(name)}
    fp8 = any(header.dtype == "F8_E4M3" for header in checkpoint.headers.values())
    return Source(
        kind="FP8" if fp8 else checkpoint.layout,
        config=config,
        text=text,
        mtp=_draft_head(folder) if mtp else {},
        vision=_vision(folder, tower),
        files={path.name: path for pattern in COMPANIONS for path in folder.glob(pattern) if path.is_file()},
    )


def _vision(folder: Path, headers: Mapping[str, Header]) -> dict[str, Tensor]:
    named = _once(folder, ((VISION.sub("vision_tower.", name), header) for name, header in headers.items()))
    tower = {name: _channels_last(name, found) for name, found in _scaled_tensors(named).items()}
    if packed := [name for name, found in tower.items() if found.dtype == mx.uint32]:
        raise CheckpointError(f"{folder}: the vision tower is quantized ({some(packed)}); leave it out by --text-only.")
    return tower


Value = TypeVar("Value")


def _once(place: Path, named: Iterable[tuple[str, Value]]) -> dict[str, Value]:
    found: dict[str, Value] = {}
    for name, value in named:
        if name in found:
            raise CheckpointError(f"{place} stores {name} twice, under different names.")
        found[name] = value
    return found


def _check_index(folder: Path, headers: Mapping[str, Header]) -> None:
    """What an index lists beside the text may be missed by nobody, and would be dropped without a word."""
    index = folder / INDEX
    listed = read_json(index)["weight_map"] if index.exists() else {}
    for name, file in listed.items():
        if name not in headers or headers[name].file != folder / file:
            raise CheckpointError(f"{index} says that {file} holds {name}, which it does not; download both again.")
    rest = unlisted_shards([folder / file for file in set(listed.values())])
    if beside := [file for file in rest if (folder / file).exists()]:
        raise CheckpointError(f"{index} lists nothing of {some(beside)}, a part of the model; download it again.")


def tensor(name: str, header: Header) -> Tensor:
    """The tensor `name` as its file holds it.

    Raises `CheckpointError` for a dtype, and for a number alone, that no checkpoint of this model has.
    """
    if header.dtype not in DTYPES:
        raise CheckpointError(f"{header.file}: {name} is stored as {header.dtype}; {', '.join(DTYPES)} can be read.")
    bits, dtype, not_finite = DTYPES[header.dtype]
    width = math.prod(header.shape[1:]) * dtype.size
    if not header.shape:
        raise CheckpointError(f"{header.file}: {name} is a number alone, and Qwen3.5 has none; download it again.")

    def rows(start: int, stop: int) -> mx.array:
        with header.file.open("rb", buffering=0) as file:
            file.seek(header.offset + start * width)
            read = np.fromfile(file, bits, (stop - start) * width // dtype.size)
        if read.nbytes != (stop - start) * width:
            raise CheckpointError(f"{header.file} ends within {name}, it was longer before; download it again.")
        if not_finite and (read << 1).max(initial=0) >= not_finite:
            raise CheckpointError(f"{header.file}: {name} holds NaN or infinity; download it again.")
        return mx.array(read.reshape(stop - start, *header.shape[1:])).view(dtype)

    return Tensor(header.shape, dtype, rows)


def _tensors(place: Path, headers: Mapping[str, Header]) -> dict[str, Tensor]:
    """By our names: experts of one kind in one tensor, gate and up apart."""
    stored = _scaled_tensors(headers)
    experts: dict[str, dict[int, Tensor]] = {}
    for name in [name for name in stored if EXPERT.match(name)]:
        prefix, index, kind, _ = EXPERT.match(name).groups()  # type: ignore[union-attr]
        experts.setdefault(f"{prefix.removesuffix('experts')}switch_mlp.{kind}.weight", {})[int(index)] = stored.pop(
            name
        )
    stacked = [(name, _stacked(f"{place}: {name}", found)) for name, found in experts.items()]
    every = [*stored.items(), *stacked]
    return _once(place, (part for name, found in every for part in _reformed(place, name, found).items()))


def _scaled_tensors(headers: Mapping[str, Header]) -> dict[str, Tensor]:
    """As they are stored, but FP8 with its scales as float32."""
    stored = {name: tensor(name, header) for name, header in headers.items()}
    for name in [name for name in stored if name.endswith(SCALE)]:
        weight = name.removesuffix(SCALE)
        if weight not in stored or headers[weight].dtype != "F8_E4M3":
            raise CheckpointError(f"{headers[name].file}: {name} scales no FP8 tensor; download the model again.")
        stored[weight] = _scaled(f"{headers[weight].file}: {weight}", stored[weight], stored.pop(name))
    bare = [name for name, found in stored.items() if headers[name].dtype == "F8_E4M3" and found.dtype == mx.uint8]
    if bare:
        raise CheckpointError(f"{headers[bare[0]].file}: {bare[0]} is FP8 without {SCALE}; download the model again.")
    return stored


def _scaled(name: str, weight: Tensor, scale: Tensor) -> Tensor:
    """E4M3 [N, K] with one scale for each block of 128 x 128, as float32."""
    N, K = weight.shape if len(weight.shape) == 2 else (0, 0)
    if scale.shape != (-(-N // FP8_BLOCK), -(-K // FP8_BLOCK)):
        raise CheckpointError(
            f"{name} {list(weight.shape)} needs a scale for every {FP8_BLOCK} x {FP8_BLOCK} block, it has "
            f"{list(scale.shape)}; download the model again."
        )

    def rows(start: int, stop: int) -> mx.array:
        first = start // FP8_BLOCK
        blocks = scale.rows(first, -(-stop // FP8_BLOCK)).astype(mx.float32)
        scales = mx.repeat(mx.repeat(blocks, FP8_BLOCK, axis=0), FP8_BLOCK, axis=1)
        skipped = first * FP8_BLOCK
        return mx.from_fp8(weight.rows(start, stop), mx.float32) * scales[start - skipped : stop - skipped, :K]

    return Tensor(weight.shape, mx.float32, rows)


def _stacked(name: str, experts: Mapping[int, Tensor]) -> Tensor:
    """[N, K] of each expert as one [experts, N, K]."""
    first = next(iter(experts.values()))
    if missing := [str(i) for i in range(len(experts)) if i not in experts]:
        raise CheckpointError(f"{name} lacks expert {some(missing)}; download the model again.")
    if odd := [str(i) for i, found in experts.items() if found.shape != first.shape]:
        raise CheckpointError(f"{name}: expert {some(odd)} has another shape than the first; download the model again.")
    shape = (len(experts), *first.shape)
    return Tensor(shape, first.dtype, lambda a, b: mx.stack([experts[i].all() for i in range(a, b)]))


def _reformed(place: Path, name: str, found: Tensor) -> dict[str, Tensor]:
    """The tensor as our modules hold it."""
    if name.endswith(CONV):
        taps = math.prod(found.shape[1:])  # [Cn, 1, K] or [Cn, K, 1]
        return {name: Tensor((found.shape[0], taps), found.dtype, lambda a, b: found.rows(a, b).reshape(b - a, taps))}
    experts, _, kind = name.rpartition("experts.")
    if kind == "down_proj":
        return {f"{experts}switch_mlp.down_proj.weight": found}
    if kind != "gate_up_proj":
        return {name: found}
    if len(found.shape) != 3 or found.shape[1] % 2:
        raise CheckpointError(f"{place}: {name} must be [experts, 2 x size, hidden size], not {list(found.shape)}.")
    size = found.shape[1] // 2
    shape = (found.shape[0], size, found.shape[2])
    return {
        f"{experts}switch_mlp.gate_proj.weight": Tensor(shape, found.dtype, lambda a, b: found.rows(a, b)[:, :size]),
        f"{experts}switch_mlp.up_proj.weight": Tensor(shape, found.dtype, lambda a, b: found.rows(a, b)[:, size:]),
    }


def _gains(checkpoint: Checkpoint, text: Mapping[str, Tensor]) -> dict[str, Tensor]:
    stored = {name: found.all() for name, found in text.items() if ZERO_CENTRED.search(name) and _is_floating(found)}
    return {name: held(array) for name, array in checkpoint.gains(stored).items()}


def _draft_head(folder: Path) -> dict[str, Tensor]:
    found = find_mtp(folder)
    if found is None:
        return {}
    tensors = _tensors(found.place, {name: header for name, (_, header) in found.stored.items()})
    stored = {name: part.all() for name, part in tensors.items() if GAIN.search(name) and _is_floating(part)}
    gains = absolute_gains(found.place, stored, zero_centred=found.zero_centred)
    return tensors | {name: held(array) for name, array in gains.items()}


def _is_floating(found: Tensor) -> bool:
    return mx.issubdtype(found.dtype, mx.floating)


def held(array: mx.array) -> Tensor:
    """A tensor that is small enough to be in memory."""
    return Tensor(array.shape, array.dtype, lambda a, b: array[a:b])


def _channels_last(name: str, found: Tensor) -> Tensor:
    """The patches' convolution [O, C, T, H, W] as MLX has it, [O, T, H, W, C]; all else as it is."""
    if not name.endswith("patch_embed.proj.weight") or len(found.shape) != 5 or found.shape[-1] == 3:
        return found
    O, C, *sizes = found.shape
    return Tensor((O, *sizes, C), found.dtype, lambda a, b: found.rows(a, b).transpose(0, 2, 3, 4, 1))
