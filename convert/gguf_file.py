"""A GGUF file from the outside: its metadata, and where the bytes of each tensor lie.

In: a file of version 2 or 3, little endian, or one of the files of a split model. Out: `Metadata` and the `Place` of
every tensor. Knows no architecture and none of the number formats. Format: docs/gguf.md of github.com/ggml-org/ggml;
the splits are those of llama.cpp's gguf-split.
"""

import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from qwen_mlx.checkpoint import some
from qwen_mlx.errors import CheckpointError

NUMBERS = dict(enumerate("<u1 <i1 <u2 <i2 <u4 <i4 <f4 ?".split())) | dict(enumerate("<u8 <i8 <f8".split(), start=10))
FLOAT32, STRING, ARRAY = 6, 8, 9
LARGEST_HEADER = 2**27  # bytes; that of Qwen3.5, with 248,320 tokens, has a tenth of it
SMALLEST_KEY, SMALLEST_TENSOR = 13, 32  # bytes of an entry with an empty name
MAX_DIMENSIONS = 4
LONGEST_NAME = 256  # characters; four times what ggml allows a tensor
DAMAGED = "it is truncated or damaged; download it again."
SPLIT = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


@dataclass(frozen=True)
class Place:
    """A tensor as the header describes it; `shape` is rows first, as in safetensors and the other way round in ggml."""

    file: Path
    shape: tuple[int, ...]
    kind: int  # number format, by its number in ggml
    offset: int  # from the beginning of the file


@dataclass(frozen=True)
class Metadata:
    """Keys and values of a header; a value that is missing or of another kind is a `CheckpointError` naming the key."""

    file: Path
    values: dict[str, Any]

    def size(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        """An integer from `least` on that 31 bits hold."""
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**31:
            raise self.wrong(key, "a positive integer" if least else "a positive integer or 0")
        return value

    def number(self, key: str) -> float:
        value = self.values.get(key)
        if not isinstance(value, float) or not 0 < value < float("inf"):
            raise self.wrong(key, "a positive number")
        return value

    def text(self, key: str) -> str:
        value = self.values.get(key)
        if not isinstance(value, str):
            raise self.wrong(key, "a text")
        return value

    def texts(self, key: str) -> list[str]:
        value = self.values.get(key)
        if not isinstance(value, list):
            raise self.wrong(key, "a list of texts")
        return value

    def integers(self, key: str) -> list[int]:
        value = self.values.get(key)
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "iu":
            raise self.wrong(key, "a list of integers")
        return [int(item) for item in value]

    def wrong(self, key: str, wanted: str) -> CheckpointError:
        """The error for a value that is missing or is not `wanted`."""
        remedy = "convert the original release again with a current llama.cpp."
        if key not in self.values:
            return CheckpointError(f"{self.file} lacks the key {key}; {remedy}")
        shown = repr(self.values[key])[:60]
        return CheckpointError(f"{self.file}: the key {key} must be {wanted}, it is {shown}; {remedy}")


def read_headers(path: Path) -> tuple[Metadata, dict[str, Place]]:
    """Metadata and tensors of the model that `path` is, or is one of the split files of.

    Raises `CheckpointError` for files that are missing, are no GGUF files of version 2 or 3, are cut off or damaged,
    or do not belong together.
    """
    files = _split_files(path)
    metadata: list[Metadata] = []
    places: dict[str, Place] = {}
    for number, file in enumerate(files):
        found, tensors = _read_header(file)
        if found.size("split.count", 1) != len(files) or found.size("split.no", 0, least=0) != number:
            raise CheckpointError(
                f"{file} is not number {number + 1} of {len(files)} files; keep the names -0000N-of-0000M.gguf that a "
                "split model came with, and all of its files in one folder."
            )
        if again := places.keys() & tensors.keys():
            raise CheckpointError(f"{file} stores {some(again)} again; {DAMAGED}")
        places |= tensors
        metadata.append(found)
    # All keys stand in the first file, the others number themselves.
    if (total := metadata[0].size("split.tensors.count", len(places), least=0)) != len(places):
        raise CheckpointError(f"{path} and the files beside it hold {len(places)} of {total} tensors; download again.")
    return metadata[0], places


def _split_files(path: Path) -> list[Path]:
    match = SPLIT.search(path.name)
    if match is None:
        files = [path]
        if not path.is_file():
            raise CheckpointError(f"There is no file {path}.")
    else:
        start, count = path.name[: match.start()], int(match[2])
        files = [path.with_name(f"{start}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1)]
        if path not in files:
            raise CheckpointError(f"{path} numbers itself {int(match[1])} of {count}; give it the name it came with.")
    if missing := [file.name for file in files if not file.is_file()]:
        raise CheckpointError(f"{path.parent} lacks {some(missing)}; download the model again.")
    return files


def _read_header(file: Path) -> tuple[Metadata, dict[str, Place]]:
    with file.open("rb") as stream:
        reader = _Reader(stream, file)
        if (magic := stream.read(4)) != b"GGUF":
            raise CheckpointError(f"{file} is no GGUF file: it begins with {magic!r} instead of b'GGUF'.")
        version = reader.integer(4, "the version")
        if version not in (2, 3):
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            what = f"big endian (version {swapped})" if swapped in (2, 3) else f"of version {version}"
            raise CheckpointError(
                f"{file} is {what}; GGUF files of version 2 and 3, little endian, are read; convert the original "
                "release again with a current llama.cpp."
            )
        tensors, keys = reader.count("tensors", SMALLEST_TENSOR), reader.count("keys", SMALLEST_KEY)
        metadata = Metadata(file, reader.metadata(keys))
        places = reader.places(tensors)
        alignment = metadata.size("general.alignment", 32)
        if alignment & (alignment - 1):
            raise metadata.wrong("general.alignment", "a power of two")
        start = -(-stream.tell() // alignment) * alignment
    return metadata, {n: Place(p.file, p.shape, p.kind, start + p.offset) for n, p in places.items()}


class _Reader:
    """Takes values off a stream, and no more than the file, or a header of sensible size, can hold."""

    def __init__(self, stream: BinaryIO, file: Path) -> None:
        self._stream, self._file = stream, file
        self._end = min(file.stat().st_size, LARGEST_HEADER)

    def count(self, what: str, smallest: int) -> int:
        count = self.integer(8, f"the number of {what}")
        if count * smallest > self._end:
            raise CheckpointError(f"{self._file} cannot hold the {count} {what} it speaks of; {DAMAGED}")
        return count

    def metadata(self, count: int) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for number in range(count):
            key = self._name(f"key {number}")
            if key in values:
                raise CheckpointError(f"{self._file} has the key {key} twice; {DAMAGED}")
            values[key] = self._value(self.integer(4, key), key)
        return values

    def places(self, count: int) -> dict[str, Place]:
        """The tensors, with offsets from the beginning of the data, which is not known yet."""
        places: dict[str, Place] = {}
        for number in range(count):
            name = self._name(f"the name of tensor {number}")
            if name in places:
                raise CheckpointError(f"{self._file} stores {name} twice; {DAMAGED}")
            dimensions = self.integer(4, name)
            if not 0 < dimensions <= MAX_DIMENSIONS:
                raise CheckpointError(f"{self._file}: {name} has {dimensions} dimensions, not 1 to 4; {DAMAGED}")
            shape = tuple(self.integer(8, name) for _ in range(dimensions))[::-1]
            places[name] = Place(self._file, shape, self.integer(4, name), self.integer(8, name))
        return places

    def integer(self, size: int, what: str) -> int:
        return int.from_bytes(self._take(size, what), "little")

    def _name(self, what: str) -> str:
        name = self._text(what)
        if not name.isprintable() or len(name) > LONGEST_NAME:
            raise CheckpointError(f"{self._file}: {what} is no name; {DAMAGED}")
        return name

    def _text(self, what: str) -> str:
        try:
            return self._take(self.integer(8, what), what).decode()
        except UnicodeDecodeError:
            raise CheckpointError(f"{self._file}: {what} is not UTF-8; {DAMAGED}") from None

    def _value(self, kind: int, key: str) -> Any:
        if kind == STRING:
            return self._text(key)
        if kind == ARRAY:
            return self._array(key)
        if kind not in NUMBERS:
            raise CheckpointError(f"{self._file}: the key {key} has a value of unknown type {kind}; {DAMAGED}")
        number = np.frombuffer(self._take(np.dtype(NUMBERS[kind]).itemsize, key), NUMBERS[kind])[0]
        # The shortest decimal of a float32, which is what config.json has: 1e-06, not 9.99999997e-07.
        return float(str(number)) if kind == FLOAT32 else number.item()

    def _array(self, key: str) -> list[str] | np.ndarray:
        kind, count = struct.unpack("<IQ", self._take(12, key))
        if kind == STRING:
            if 8 * count > self._end:
                raise CheckpointError(f"{self._file} cannot hold the {count} texts of the key {key}; {DAMAGED}")
            return [self._text(key) for _ in range(count)]
        if kind not in NUMBERS:
            raise CheckpointError(f"{self._file}: the key {key} has elements of unknown type {kind}; {DAMAGED}")
        return np.frombuffer(self._take(count * np.dtype(NUMBERS[kind]).itemsize, key), NUMBERS[kind])

    def _take(self, size: int, what: str) -> bytes:
        if size > self._end - self._stream.tell():
            raise CheckpointError(f"{self._file} ends within {what}; {DAMAGED}")
        return self._stream.read(size)
