"""Which checkpoint is this? Names, shapes and conventions of a folder's safetensors files, told from their headers.

In: a model folder. Out: a `Checkpoint` whose `tensors()` are lazy arrays under the names of our modules, with the
changes of value that the layout asks for (gains become 1 + w in float32, convolutions [Cn, K]). Knows no modules.

Three layouts are read (their tables: MLX prefixes beside the released ones below):
released   `model.language_model.*`, gains stored as w, conv1d [Cn, 1, K]
MLX        `language_model.model.*`, gains stored as 1 + w rounded to the file's dtype, conv1d [Cn, K, 1]
qwen_mlx   the MLX layout with the exact float32 gains in qwen_mlx/gains.safetensors
"""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from qwen_mlx.config import read_json
from qwen_mlx.errors import CheckpointError

# Order matters: the longer prefix first. The right-hand names are those of our modules.
PREFIXES = (
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("lm_head.", "lm_head."),
    ("model.", "model."),
)
# Parts of the checkpoint that text generation does not read.
OTHER_PARTS = re.compile(r"^(model\.)?(language_model\.)?(model\.)?(visual|mtp)\.|^vision_tower\.")
ZERO_CENTRED = re.compile(r"(layernorm|q_norm|k_norm|^model\.norm)\.weight$")
CONV = "linear_attn.conv1d.weight"
GAINS = Path("qwen_mlx", "gains.safetensors")
INDEX = "model.safetensors.index.json"
ROUNDING = 2.0**-8  # of a bfloat16, relative, with room for another way of rounding
PLAUSIBLE_GAIN = (0.3, 1.75)  # mean over all layer norms; some 1 in what others measured, 0 or 2 by a wrong shift


# Bytes of the kinds of numbers that MLX reads, as safetensors spells them.
SIZES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "C64"), 8),
}
LARGEST_HEADER = 100_000_000  # bytes; the format's own bound


@dataclass(frozen=True)
class Header:
    """One tensor as its file's header describes it: `dtype` as safetensors spells it, `offset` in bytes of the file."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Checkpoint:
    folder: Path
    layout: str  # "released", "MLX" or "qwen_mlx"
    headers: dict[str, Header]  # by the name in the file; text model only
    others: dict[str, Header]  # draft head and vision tower
    names: dict[str, str]  # name in the file -> name in our modules

    def tensors(self) -> dict[str, mx.array]:
        """Every text tensor, lazy, by our name; the gains of the layout decided by structure and checked by value."""
        files = sorted({header.file for header in self.headers.values()})
        raw = {name: array for file in files for name, array in load_file(file).items() if name in self.names}
        tensors: dict[str, mx.array] = {}
        for name, array in raw.items():
            reformed = reform(self.names[name], array)
            if again := reformed.keys() & tensors.keys():
                raise CheckpointError(f"{self.folder} stores {some(again)} twice, under different names.")
            tensors |= reformed
        floating = {n: a for n, a in tensors.items() if mx.issubdtype(a.dtype, mx.floating)}
        return tensors | self.gains({n: a for n, a in floating.items() if ZERO_CENTRED.search(n)})

    def gains(self, stored: dict[str, mx.array]) -> dict[str, mx.array]:
        """All zero-centred gains as stored, by our names -> 1 + w in float32, as exact as the folder has it."""
        stored = {name: array.astype(mx.float32) for name, array in stored.items()}
        return self._absolute(stored) | (self._exact_gains(stored) if self.layout == "qwen_mlx" else {})

    def _absolute(self, gains: dict[str, mx.array]) -> dict[str, mx.array]:
        """1 + w where w is stored. Only whole families are judged: one layer's mean may lie anywhere."""
        shift = 1.0 if self.layout == "released" else 0.0
        for kind in ("input", "post_attention"):
            means = [mx.mean(a) for n, a in gains.items() if n.endswith(f".{kind}_layernorm.weight")]
            if not means:
                continue
            stored = mx.mean(mx.stack(means)).item()
            assert isinstance(stored, float)
            low, high = PLAUSIBLE_GAIN
            if math.isfinite(stored) and not low <= stored + shift <= high:
                raise CheckpointError(
                    f"{self.folder}: the {kind} norms were shifted once too often or too little for the {self.layout} "
                    f"layout, their mean being {stored:.3f} as stored, {stored + shift:.3f} as a gain, and plausible "
                    f"between {low} and {high}; convert the original release again."
                )
        return {name: array + shift for name, array in gains.items()}

    def _exact_gains(self, rounded: dict[str, mx.array]) -> dict[str, mx.array]:
        file = self.folder / GAINS
        names = {name: our_name(name) or name for name in read_header(file)}
        exact = {names[name]: array.astype(mx.float32) for name, array in load_file(file).items()}
        if unknown := exact.keys() - rounded.keys():
            raise CheckpointError(f"{file} holds unknown gains: {some(unknown)}.")
        for name, array in exact.items():
            close = array.shape == rounded[name].shape and mx.allclose(rounded[name], array, ROUNDING, equal_nan=True)
            if not close:
                raise CheckpointError(
                    f"{file} does not belong to the weights beside it: {name} is not what they hold rounded; delete it "
                    "or convert the model again."
                )
        return exact


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read every header of the folder's safetensors files and decide the layout.

    Raises `CheckpointError` for missing, truncated or unreadable files, unknown tensors, a tensor stored twice, and
    files of two conventions in one folder.
    """
    every: dict[str, Header] = {}
    for file in weight_files(folder):
        for name, header in read_header(file).items():
            if name in every:
                raise CheckpointError(f"{name} is stored twice, in {every[name].file.name} and {file.name}.")
            every[name] = header
    others = {name: header for name, header in every.items() if OTHER_PARTS.match(name)}
    headers = {name: header for name, header in every.items() if name not in others}
    names = {name: our_name(name) for name in headers}
    unknown = [name for name, ours in names.items() if ours is None]
    if unknown:
        raise CheckpointError(f"{folder} holds tensors that Qwen3.5 does not have: {some(unknown)}.")
    known = {k: v for k, v in names.items() if v is not None}
    return Checkpoint(folder, _layout(folder, headers), headers, others, known)


def reform(name: str, array: mx.array) -> dict[str, mx.array]:
    """The tensor as our modules hold it: convolutions [Cn, K], and the experts' gate and up projections apart."""
    if name.endswith(CONV):
        return {name: array.squeeze(1 if array.shape[1] == 1 else 2)}
    experts, _, kind = name.rpartition("experts.")
    if kind == "gate_up_proj":
        if array.ndim != 3 or array.shape[1] % 2:
            raise CheckpointError(f"{name} must be [experts, 2 x size, hidden size], not {list(array.shape)}.")
        gate, up = mx.split(array, 2, axis=1)
        return {f"{experts}switch_mlp.gate_proj.weight": gate, f"{experts}switch_mlp.up_proj.weight": up}
    if kind == "down_proj":
        return {f"{experts}switch_mlp.down_proj.weight": array}
    return {name: array}


def our_name(name: str) -> str | None:
    for prefix, ours in PREFIXES:
        if name.startswith(prefix):
            return ours + name.removeprefix(prefix)
    return None


def _layout(folder: Path, headers: dict[str, Header]) -> str:
    convolutions = {name: header.shape for name, header in headers.items() if name.endswith(CONV)}
    odd = [name for name, shape in convolutions.items() if len(shape) != 3 or 1 not in shape[1:]]
    if odd:
        shape = convolutions[odd[0]]
        raise CheckpointError(f"{odd[0]} must be [channels, 1, taps] or [channels, taps, 1], not {list(shape)}.")
    released = {name for name, shape in convolutions.items() if shape[1] == 1}
    if released and released != convolutions.keys():
        converted = next(iter(convolutions.keys() - released))
        raise CheckpointError(
            f"{folder} mixes files of two conventions: {next(iter(released))} is as released and {converted} is "
            "converted; take all files from one place."
        )
    if released or (not convolutions and not any(name.startswith("language_model.model.") for name in headers)):
        return "released"
    return "qwen_mlx" if (folder / GAINS).exists() else "MLX"


def weight_files(folder: Path) -> list[Path]:
    """The weight files, by the index where there is one."""
    index = folder / INDEX
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise CheckpointError(f"{index} has no weight_map from tensors to files; download it again.")
        if outside := {name for name in weight_map.values() if Path(name).is_absolute() or ".." in Path(name).parts}:
            raise CheckpointError(f"{index} names files outside of its folder: {some(outside)}; download it again.")
        files = [folder / name for name in sorted(set(weight_map.values()))]
    else:
        # A draft head that stands beside the model (model-mtp.safetensors) has bare names; text does not need it.
        files = sorted(file for file in folder.glob("model*.safetensors") if "mtp" not in file.name)
        files += [folder / name for name in unlisted_shards(files)]
    if not files:
        raise CheckpointError(f"{folder} holds no model*.safetensors file.")
    missing = [file.name for file in files if not os.path.isfile(file)]  # False for names that no file can have
    if missing:
        raise CheckpointError(f"{folder} lacks {some(missing)}; download the model again.")
    return files


def unlisted_shards(files: list[Path]) -> list[str]:
    """Names that 'model-00001-of-00003' promises and the folder does not keep."""
    promised = set()
    for file in files:
        if match := re.search(r"(\d{1,5})-of-(\d{1,5})\b", file.name):
            count, width = int(match[2]), len(match[1])
            promised |= {file.name.replace(match[0], f"{i:0{width}}-of-{match[2]}") for i in range(1, count + 1)}
    return sorted(promised - {file.name for file in files})


def read_header(file: Path) -> dict[str, Header]:
    """The tensors of a safetensors file (8 bytes of length, JSON, data), once all of its data is known to be there."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise CheckpointError(
                f"{file} is truncated or no safetensors file: {size} bytes cannot hold its header; download it again."
            )
        try:
            if length > LARGEST_HEADER:
                raise ValueError
            entries = json.loads(stream.read(length), object_pairs_hook=partial(_told_once, file))
            metadata = entries.pop("__metadata__", None) or {}
            "".join([*entries, *metadata, *metadata.values()]).encode()  # MLX takes nothing but text
        except (ValueError, TypeError, AttributeError, RecursionError):
            raise CheckpointError(
                f"{file} is no safetensors file: its header cannot be read; download it again."
            ) from None
    found = {name: _header(file, 8 + length, name, entry) for name, entry in entries.items()}
    _check_places(file, 8 + length, size, found)
    return found


def _told_once(file: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    told = dict(pairs)
    if len(told) < len(pairs):
        again = [name for name, times in Counter(name for name, _ in pairs).items() if times > 1]
        raise CheckpointError(f"{file}: its header tells {some(again)} twice; download it again.")
    return told


def _header(file: Path, data: int, name: str, entry: Any) -> Header:
    """From the entry for `name` in the header of `file`, whose data begins at byte `data`."""
    try:
        shape, (start, end), dtype = tuple(entry["shape"]), entry["data_offsets"], str(entry["dtype"])
        # MLX counts rows and columns in 32 bits.
        if any(type(n) is not int or n < 0 for n in (*shape, start, end - start)) or max(shape, default=0) >= 2**31:
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(
            f"{file} is no safetensors file: its header cannot be read, where it tells of {name}; download it again."
        ) from None
    if dtype not in SIZES:
        raise CheckpointError(f"{file} cannot be loaded ({name} is stored as {dtype}); download it again.")
    if end - start != math.prod(shape) * SIZES[dtype]:
        raise CheckpointError(
            f"{file} cannot be loaded ({name}, {list(shape)} in {dtype}, cannot have {end - start} bytes); download it "
            "again."
        )
    return Header(file, shape, dtype, data + start, end - start)


def _check_places(file: Path, data: int, size: int, headers: Mapping[str, Header]) -> None:
    """Tensors stand one behind the other, in any order, and fill the file of `size` bytes from byte `data` on."""
    end = max((header.offset + header.nbytes for header in headers.values()), default=data)
    if size < end:
        raise CheckpointError(f"{file} is truncated: {size} of {end} bytes; download it again.")
    if size > end:
        raise CheckpointError(f"{file} has {size} bytes, and its header tells of {end}; download it again.")
    for name, header in sorted(headers.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if header.offset != data:
            what = "overlaps with" if header.offset < data else "leaves a hole behind"
            raise CheckpointError(f"{file}: {name} {what} the tensor before it; download it again.")
        data += header.nbytes


def load_file(file: Path) -> dict[str, mx.array]:
    return load_with_metadata(file)[0]


def load_with_metadata(file: Path) -> tuple[dict[str, mx.array], dict[str, Any]]:
    try:
        arrays, metadata = mx.load(str(file), return_metadata=True)
    except RuntimeError as error:
        reason = str(error).rstrip(".").replace(". ", ", ")
        raise CheckpointError(f"{file} cannot be loaded ({reason}); download it again.") from None
    assert isinstance(arrays, dict)
    assert isinstance(metadata, dict)
    return arrays, metadata


def some(names: Collection[str]) -> str:
    """At most four of `names`, and how many more there are."""
    shown = sorted(names)[:4]
    return ", ".join(shown) + (f" and {len(names) - len(shown)} more" if len(names) > len(shown) else "")
