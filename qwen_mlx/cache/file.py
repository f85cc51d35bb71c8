"""A `SequenceCache` as one safetensors file and back: all that its next token reads, the token ids, whose it is.

`layers.N.keys_values` has the filled part of a slab, [2, 1, Hkv, T, Dh]; in 4 or 8 bits `layers.N.packed`, `.scales`
and `.biases`; a recurrent layer has `layers.N.conv_state` and `.recurrent_state`; `tokens` [T] are the ids. Everything
keeps its dtype. The header's metadata has a SHA-256 over the whole file, taken with zeros in its own place.

How to get back over the last update is not kept, nor are checkpoints. Knows no model: what tells one from another
comes in as a `Fingerprint`.
"""

import hashlib
import json
import math
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx
import numpy as np

from qwen_mlx.cache.kv import KVCache
from qwen_mlx.cache.quantized_kv import QuantizedKVCache
from qwen_mlx.cache.recurrent import RecurrentCache
from qwen_mlx.cache.sequence import SequenceCache
from qwen_mlx.errors import PromptCacheError

FORMAT = "qwen_mlx prompt cache 1"
NO_DIGEST = "0" * 64
DTYPES = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16, "U32": mx.uint32}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
BLOCK = 1 << 24  # bytes read at once for the SHA-256
LARGEST_HEADER = 100_000_000  # bytes; the format's own bound


@dataclass(frozen=True)
class Fingerprint:
    """Whose a cache is. `name` is for people; the other fields must be equal for a cache to go on."""

    name: str
    model: str
    tokenizer: str
    template: str
    dtype: str


def write_cache(
    path: str | Path, cache: SequenceCache, tokens: Sequence[int], fingerprint: Fingerprint, *, note: str = ""
) -> None:
    """Write `cache` and its `tokens`, all that it holds in order, to `path`, which appears when it is complete; with a
    `note` of the caller's, for `read_note`.

    Until then, and after an error or Ctrl-C, a file that was there stays as it was.

    Raises ValueError for an empty cache, `tokens` of another length, or several or padded rows; `PromptCacheError`
    where the file cannot be written.
    """
    if not cache.offset:
        raise ValueError("The cache is empty: there is nothing to save before a prompt has gone through the model.")
    cache.check_tokens(tokens)
    rows = {a.shape[0 if isinstance(layer, RecurrentCache) else 1] for layer in cache.layers for a in layer.arrays}
    if rows != {1} or cache.left_padding is not None:
        raise ValueError("A prompt file holds one sequence without padding; give each row of a batch its own cache.")
    arrays, room = _filled(cache)
    arrays["tokens"] = mx.array(list(tokens), mx.uint32)
    about = {"form": cache.form, "room": room, "fingerprint": asdict(fingerprint), "note": note}
    # The digest comes first, so that nothing which looks like it stands before it.
    _write(Path(path), {"sha256": NO_DIGEST, "format": FORMAT, "about": json.dumps(about)}, arrays)


def read_cache(path: str | Path, cache: SequenceCache, fingerprint: Fingerprint) -> list[int]:
    """Fill `cache`, which `make_cache` has just given, from `path`; returns the ids of the tokens it holds then.

    It goes on as the saved one would have, bit for bit, but for the way back over its last update.

    Raises ValueError for a cache that is not empty or has padding; `PromptCacheError` where there is no such file, it
    cannot be read, is damaged or none of ours, or where the fingerprint or the kind of cache differs. `cache` is then
    as it was.
    """
    if cache.offset or cache.left_padding is not None:
        raise ValueError("A prompt file is loaded into an empty cache without padding; take one from make_cache().")
    path = Path(path)
    try:
        with path.open("rb") as file:
            header, data = _verified_header(path, file)
            metadata = header.pop("__metadata__")
            about = json.loads(metadata["about"])
            _refuse_another(path, Fingerprint(**about["fingerprint"]), fingerprint)
            _refuse_another_form(path, about["form"], cache)
            arrays = {name: _read_array(file, data, entry) for name, entry in header.items()}
    except FileNotFoundError:
        raise PromptCacheError(f"There is no prompt file {path}; check the path, or make the file first.") from None
    except OSError as error:
        raise PromptCacheError(f"{path} cannot be read ({error.strerror}); give a file that you may read.") from None
    except (ValueError, KeyError, TypeError):  # of a file that changes while it is read
        raise PromptCacheError(_damaged(path)) from None
    found = np.array(arrays.pop("tokens")).tolist()
    _fill(cache, arrays, about["room"])
    return found


def read_note(path: str | Path) -> str:
    """The note of a file that `read_cache` has taken. Raises `PromptCacheError` for one that has changed since."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            header, _ = _verified_header(path, file)
            return str(json.loads(header["__metadata__"]["about"])["note"])
    except (OSError, ValueError, KeyError, TypeError):
        raise PromptCacheError(_damaged(path)) from None


def _names(place: int, layer: KVCache | RecurrentCache) -> list[str]:
    """What the layer's `arrays` are called in the file."""
    if isinstance(layer, RecurrentCache):
        kinds = ["conv_state", "recurrent_state"]
    else:
        kinds = ["packed", "scales", "biases"] if isinstance(layer, QuantizedKVCache) else ["keys_values"]
    return [f"layers.{place}.{kind}" for kind in kinds]


def _filled(cache: SequenceCache) -> tuple[dict[str, mx.array], int]:
    """All arrays by their names, slabs without what is not filled, and how many tokens the slabs have room for."""
    arrays, room = {}, cache.offset
    for place, layer in enumerate(cache.layers):
        for name, array in zip(_names(place, layer), layer.arrays, strict=True):
            if not isinstance(layer, RecurrentCache):
                array, room = array[:, :, :, : layer.offset], array.shape[3]
            arrays[name] = array
    return arrays, room


def _fill(cache: SequenceCache, arrays: dict[str, mx.array], room: int) -> None:
    """Slabs get the room they had: a compiled step attends to all of it, and another length may round differently.

    `arrays` is emptied layer by layer, so that no more than one of them is in memory twice.
    """
    for place, layer in enumerate(cache.layers):
        held = [arrays.pop(name) for name in _names(place, layer)]
        if isinstance(layer, RecurrentCache):
            conv_state, recurrent_state = held
            layer.restore((conv_state, recurrent_state))
        else:
            layer.fill([held], room)
            mx.eval(layer.arrays)


def _write(path: Path, metadata: dict[str, str], arrays: Mapping[str, mx.array]) -> None:
    """All of `arrays` in a safetensors file, whose digest takes its place when the rest is written."""
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, array in arrays.items():
        start, end = end, end + array.nbytes
        header[name] = {"dtype": NAMES[array.dtype], "shape": list(array.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    text = len(text).to_bytes(8, "little") + text
    digest = hashlib.sha256(text)
    path = path.resolve()  # of a link, what it leads to is written
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):  # such as /dev/null
        raise PromptCacheError(f"{path} is no file that could be replaced; give another name.")
    unfinished = Path(f"{path}.{secrets.token_hex(4)}.unfinished")  # others may write the same file now
    try:
        with unfinished.open("wb") as file:
            file.write(text)
            for array in arrays.values():
                data = _data(array)
                digest.update(data)
                file.write(data)
            file.seek(text.index(NO_DIGEST.encode()))
            file.write(digest.hexdigest().encode())
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError as error:
        _remove(unfinished)
        raise PromptCacheError(
            f"{path} cannot be written ({error.strerror}): it takes {len(text) + end:,} bytes in a folder that exists "
            "and that you may write to."
        ) from None
    except BaseException:
        _remove(unfinished)
        raise


def _remove(unfinished: Path) -> None:
    try:
        unfinished.unlink(missing_ok=True)
    except OSError:  # the folder may not be written to, and what went wrong first is what counts
        return


def _data(array: mx.array) -> memoryview:
    words = array.view(mx.uint16 if array.dtype.size == 2 else mx.uint32)  # NumPy has no bfloat16
    return np.ascontiguousarray(np.array(words, copy=False)).data.cast("B")


def _verified_header(path: Path, file: BinaryIO) -> tuple[dict[str, Any], int]:
    """The header, once every byte of the file is known to be as it was written, and where the data begins."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, LARGEST_HEADER):
        raise PromptCacheError(_damaged(path))
    text = file.read(length)
    try:
        header = json.loads(text)
        metadata = header["__metadata__"]
        form, digest = metadata.get("format"), metadata.get("sha256")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise PromptCacheError(_damaged(path)) from None
    if form != FORMAT:
        raise PromptCacheError(
            f"{path} is no prompt file that this version of qwen_mlx reads: its format is {form!r}, not {FORMAT!r}; "
            "make it again."
        )
    blank = text.replace(str(digest).encode(), NO_DIGEST.encode(), 1)
    found = hashlib.sha256(length.to_bytes(8, "little") + blank)
    while block := file.read(BLOCK):
        found.update(block)
    if found.hexdigest() != digest:
        raise PromptCacheError(_damaged(path))
    return header, 8 + length


def _read_array(file: BinaryIO, data: int, entry: Mapping[str, Any]) -> mx.array:
    dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
    file.seek(data + entry["data_offsets"][0])
    words = np.frombuffer(file.read(math.prod(shape) * dtype.size), np.uint16 if dtype.size == 2 else np.uint32)
    return mx.array(words.reshape(shape)).view(dtype)


def _refuse_another(path: Path, theirs: Fingerprint, ours: Fingerprint) -> None:
    mine = asdict(ours)
    different = [part for part, value in asdict(theirs).items() if part != "name" and value != mine[part]]
    if different:
        raise PromptCacheError(
            f"{path} was made with {theirs.name} in {theirs.dtype}, and this is {ours.name} in {ours.dtype}: they "
            f"differ in {' and '.join(different)}; load what it was made with, or make the file again."
        )


def _refuse_another_form(path: Path, theirs: Sequence[str], cache: SequenceCache) -> None:
    """The model is the same one here; keys and values may be kept in other numbers of bits."""
    for place, (other, mine) in enumerate(zip(theirs, cache.form, strict=True)):
        if other != mine:
            raise PromptCacheError(
                f"{path} was made with another kind of cache: layer {place} holds {other} there, and {mine} here; "
                "give the same kv_bits, or make the file again."
            )


def _damaged(path: Path) -> str:
    return f"{path} is damaged or no prompt file: its bytes are not those that were written; make it again."
