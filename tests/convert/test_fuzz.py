"""Thousands of damaged checkpoints: each is refused by a known exception, or converts to what it was.

One file of a sound folder is damaged in one place, by a fixed seed: a header, a configuration or an index as JSON (keys
dropped, renamed, told twice, values of all kinds), or bytes of it. A conversion then ends in `CheckpointError` or
`ConversionError`, or in a model that has the weights and the logits of the undamaged one, bit for bit.
"""

import json
import os
import random
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from qwen_mlx.convert.folder import Request, write
from qwen_mlx.convert.opened import open_model
from qwen_mlx.convert.recipes import Form
from qwen_mlx.errors import CheckpointError, ConversionError
from qwen_mlx.load import load_model
from tests.convert.test_source import fp8, write_fp8
from tests.golden.checkpoints import Variant, config, shapes
from tests.layouts import Tensors, draft_head, single_experts, trunk
from tests.layouts import write as write_layout

DENSE = Variant(0, 32, (2, 1, 32), (2, 4, 16, 16), (2, 1, 1), tied=False, intermediate=64)
EXPERTS = Variant(0, 32, (2, 1, 32), (2, 4, 16, 16), (2, 1, 1), tied=True, experts=(4, 2, 32, 32))
TOKENS = mx.array([[5, 7, 11, 13, 17, 300, 2, 1]])
INDEX = "model.safetensors.index.json"
BATCH = 50  # cases in a test
SECONDS = 20  # that no case comes near
MEMORY = 2 << 30  # bytes of address space that one may take; the checkpoints have 200 kB

# What may be told otherwise and give another model, which is then the model that was asked for.
MEANT = {"rms_norm_eps", "rope_theta", "num_experts_per_tok"}


@dataclass(frozen=True)
class Target:
    """`count` damaged copies of one file of a checkpoint."""

    base: str
    file: str
    damage: Callable[[bytes, random.Random], bytes]
    count: int


def tensors_of(sizes: Variant) -> Tensors:
    """Random weights under the released names, of a scale at which every part moves the logits."""
    values = np.random.RandomState(5)
    found: Tensors = {}
    for name, shape in shapes(sizes).items():
        array = mx.array(values.standard_normal(shape) * (0.15 if len(shape) == 1 else 0.4))
        exact = name.endswith(("A_log", "linear_attn.norm.weight"))
        found[name] = (1 + array).astype(mx.float32) if exact else array.astype(mx.bfloat16)
    return found


def released(folder: Path, sizes: Variant, tensors: Tensors, file: str = "model.safetensors") -> Path:
    described = folder.with_name(folder.name + ".described")
    described.mkdir(exist_ok=True)
    (described / "config.json").write_text(json.dumps(config(sizes)))
    (described / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 4], "top_k": 20}))
    return write_layout(folder, described, tensors, file)


def sharded(folder: Path) -> Path:
    tensors = list(tensors_of(DENSE).items())
    files = [f"model-{i:05}-of-00003.safetensors" for i in (1, 2, 3)]
    head = len(trunk(dict(tensors)))
    parts = dict(zip(files, (tensors[:20], tensors[20:head], tensors[head:])))  # the last one is the draft head
    for file, part in parts.items():
        released(folder, DENSE, dict(part), file)
    weight_map = {name: file for file, part in parts.items() for name, _ in part}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return folder


def one_by_one(folder: Path) -> Path:
    tensors = tensors_of(EXPERTS)
    head = {f"mtp.{name}": array for name, array in single_experts(draft_head(tensors)).items()}
    return released(folder, EXPERTS, single_experts(trunk(tensors)) | head)


def converted(folder: Path) -> Path:
    """Our own 4-bit form, with gains and draft head in files of their own."""
    source = released(folder.with_name("source"), DENSE, tensors_of(DENSE))
    write(open_model(source), Request(folder, "bfloat16", lambda path: Form(4, 32), {}))
    return folder.with_name(folder.name + ".partial")


def beside(folder: Path) -> Path:
    """The draft head in a file of its own, under the names of the release."""
    tensors = tensors_of(DENSE)
    released(folder, DENSE, {f"mtp.{name}": array for name, array in draft_head(tensors).items()}, "mtp.safetensors")
    return released(folder, DENSE, trunk(tensors))


def in_fp8(folder: Path) -> Path:
    source = released(folder.with_name("source"), DENSE, tensors_of(DENSE))
    return write_fp8(folder, source, fp8(tensors_of(DENSE)))


BASES: dict[str, Callable[[Path], Path]] = {
    "released": lambda folder: released(folder, DENSE, tensors_of(DENSE)),
    "experts": one_by_one,
    "sharded": sharded,
    "converted": converted,
    "beside": beside,
    "FP8": in_fp8,
}


@dataclass(frozen=True)
class Result:
    """What a conversion to floats wrote, and what it computes."""

    weights: dict[str, bytes]
    logits: np.ndarray


def convert(source: Path, folder: Path) -> Result:
    request = Request(folder, "bfloat16", lambda path: None, {"recipe": None})
    write(open_model(source), request)
    weights = {file.relative_to(request.partial).as_posix(): file for file in request.partial.rglob("*.safetensors")}
    logits = np.array(load_model(request.partial, dtype="float32")(TOKENS))
    return Result({name: file.read_bytes() for name, file in weights.items()}, logits)


@pytest.fixture(autouse=True)
def no_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting for the disk would be most of the time."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Result]]:
    """`sound(base)`: the undamaged folder and its conversion."""
    made: dict[str, tuple[Path, Result]] = {}

    def make(base: str) -> tuple[Path, Result]:
        if base not in made:
            place = tmp_path_factory.mktemp(base)
            folder = BASES[base](place / "model")
            made[base] = folder, convert(folder, place / "converted")
        return made[base]

    return make


@contextmanager
def bounded() -> Iterator[None]:
    """No hang, and no allocation of what a damaged number asks for."""

    def hung(signum: int, frame: FrameType | None) -> None:
        raise AssertionError(f"hangs: no end after {SECONDS} s")

    before, limits = signal.signal(signal.SIGALRM, hung), resource.getrlimit(resource.RLIMIT_AS)
    if sys.platform == "linux":
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, limits[1]))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)


SCALARS: list[Any] = [None, True, False, 0, 1, -1, 2, 2**31 - 1, 2**31, 2**40, 2**63, 2**64, 10**400, 0.5, 1e-30, 1e308,
                      float("nan"), float("inf"), "", "x", "2", "\ud800", "../x", "a/b", "BF16", "F32", "F16", "U32",
                      "U8", "I64", "F64", "F8_E4M3", "F6", "default", "qwen3_5_moe", "full_attention"]  # fmt: skip


def value(old: Any, siblings: list[Any], chance: random.Random) -> Any:
    """Something else in the place of `old`: near to it, of its kind, or anything."""
    near: list[Any] = [chance.choice(siblings), [old], {"a": old}, [], {}]
    if isinstance(old, (int, float)):
        near += [old + 1, old - 1, 2 * old, -old, old * 2**20, float(old), str(old), old // 2] * 2
    if isinstance(old, str):
        near += [old + "x", old[1:], old.upper(), old * 2] * 2
    if isinstance(old, list):
        near += [old[1:], old[::-1], old + old, [*old, 0], [old, old], old[:1]] * 2
    deep: Any = old
    for _ in range(chance.choice((150, 3000))):
        deep = [deep]
    return chance.choice([*near, *SCALARS, deep])


def inner(found: Any) -> Iterator[Any]:
    """All objects and lists in `found` that hold something."""
    children = found.values() if isinstance(found, dict) else found if isinstance(found, list) else ()
    if children:
        yield found
    for child in children:
        yield from inner(child)


def damaged_json(content: bytes, chance: random.Random) -> bytes:
    whole = json.loads(content)
    containers = list(inner(whole))
    place = containers[0] if chance.random() < 0.3 else chance.choice(containers)
    key = chance.choice(list(place) if isinstance(place, dict) else range(len(place)))
    siblings = list(place.values() if isinstance(place, dict) else place)
    again = ""
    match chance.randrange(6):
        case 0:
            del place[key]
        case 1 if isinstance(place, dict):
            place[chance.choice([f"{key}x", key[1:], key.upper(), "", chance.choice([*place, "x"])])] = place.pop(key)
        case 2 if isinstance(place, dict):
            again = chance.choice([json.dumps(place[key]), json.dumps(chance.choice(siblings)), "0", "{}"])
            place[key] = [place[key], "told twice"]
        case _:
            place[key] = value(place[key], siblings, chance)
    with deep_recursion():
        text = json.dumps(whole)
    if again:
        start = text.index(f"{json.dumps(key)}: [")
        first = json.dumps(place[key])
        text = text[:start] + text[start:].replace(first, f"{json.dumps(place[key][0])}, {json.dumps(key)}: {again}", 1)
    return text.encode()


@contextmanager
def deep_recursion() -> Iterator[None]:
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(10_000)
    yield
    sys.setrecursionlimit(before)


def damaged_header(content: bytes, chance: random.Random) -> bytes:
    length = int.from_bytes(content[:8], "little")
    header = damaged_json(content[8 : 8 + length], chance)
    header += b" " * chance.choice([0, -len(header) % 8])
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def damaged_bytes(content: bytes, chance: random.Random, before: int = 0) -> bytes:
    """Bits of the first part flipped, bytes taken out, put in, or cut off."""
    header = before or 8 + int.from_bytes(content[:8], "little")
    changed = bytearray(content)
    at = chance.choice([chance.randrange(8), chance.randrange(header), chance.randrange(header)])
    match chance.randrange(8):
        case 0:
            del changed[chance.choice([at, chance.randrange(len(content))]) :]
        case 1:
            del changed[at : at + chance.choice([1, 2, 8])]
        case 2:
            changed[at:at] = bytes(chance.randrange(256) for _ in range(chance.choice([1, 8])))
        case 3:
            changed[:8] = chance.choice([0, 1, header, 2**31, 2**63, 2**64 - 1, len(content) - 8]).to_bytes(8, "little")
        case 4:
            changed += bytes(chance.choice([1, 8, 4096]))
        case _:
            for _ in range(chance.choice([1, 1, 2, 5])):
                changed[chance.choice([at, chance.randrange(header)])] ^= 1 << chance.randrange(8)
    return bytes(changed)


WEIGHTS = "model.safetensors"
TARGETS = [
    Target("released", WEIGHTS, damaged_header, 500),
    Target("experts", WEIGHTS, damaged_header, 250),
    Target("converted", WEIGHTS, damaged_header, 250),
    Target("converted", "qwen_mlx/gains.safetensors", damaged_header, 100),
    Target("converted", "mtp/model.safetensors", damaged_header, 150),
    Target("beside", "mtp.safetensors", damaged_header, 150),
    Target("FP8", WEIGHTS, damaged_header, 200),
    Target("sharded", "model-00003-of-00003.safetensors", damaged_header, 100),
    Target("released", WEIGHTS, damaged_bytes, 400),
    Target("converted", "mtp/model.safetensors", damaged_bytes, 100),
    Target("released", "config.json", damaged_json, 500),
    Target("experts", "config.json", damaged_json, 200),
    Target("converted", "config.json", damaged_json, 100),
    Target("converted", "mtp/config.json", damaged_json, 50),
    Target("FP8", "config.json", damaged_json, 100),
    Target("released", "config.json", partial(damaged_bytes, before=200), 100),
    Target("released", "generation_config.json", damaged_json, 50),
    Target("sharded", INDEX, damaged_json, 300),
]
BATCHES = {
    f"{number}-{target.base}-{target.file}-{start}": (target, start)
    for number, target in enumerate(TARGETS)
    for start in range(0, target.count, BATCH)
}


def told_otherwise(before: bytes, after: bytes) -> set[str]:
    """The fields of a config.json that are meant to change a model, and have another value."""

    def fields(found: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(found, dict):
            for key, child in found.items():
                yield key, json.dumps(child) if key in MEANT else None
                yield from fields(child)

    try:
        return {key for key, _ in set(fields(json.loads(before))) ^ set(fields(json.loads(after)))} & MEANT
    except (ValueError, RecursionError):
        return set()


def told_as_the_other_half(before: bytes, after: bytes) -> bool:
    """A bfloat16 that is called a float16 is another number, and nobody can tell."""

    def dtypes(file: bytes) -> dict[str, Any]:
        entries = json.loads(file[8 : 8 + int.from_bytes(file[:8], "little")])
        return {name: entry.get("dtype") for name, entry in entries.items()}

    try:
        ours, theirs = dtypes(before), dtypes(after)
    except (ValueError, RecursionError, AttributeError):
        return False
    return any({ours[name], theirs.get(name)} == {"F16", "BF16"} for name in ours)


def fault(source: Path, wanted: Result, folder: Path, meant: bool) -> str | None:
    """What is wrong with how the conversion of a damaged folder ends."""
    try:
        with bounded():
            found = convert(source, folder)
    except (CheckpointError, ConversionError) as error:
        return None if str(error).endswith(".") else f"no sentence: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        assert not folder.exists()
        shutil.rmtree(folder.with_name(folder.name + ".partial"), ignore_errors=True)
    if found.weights != wanted.weights:
        return "other weights"
    return None if meant or np.array_equal(found.logits, wanted.logits) else "other logits"


@pytest.mark.parametrize(("target", "start"), BATCHES.values(), ids=BATCHES.keys())
def test_damage_is_refused_or_does_no_harm(
    target: Target, start: int, sound: Callable[[str], tuple[Path, Result]], tmp_path: Path
) -> None:
    folder, wanted = sound(target.base)
    damaged = shutil.copytree(folder, tmp_path / "model")
    content = (folder / target.file).read_bytes()
    faults = {}
    for seed in range(start, start + BATCH):
        changed = target.damage(content, random.Random(seed))
        (damaged / target.file).write_bytes(changed)
        meant = target.file == "config.json" and bool(told_otherwise(content, changed))
        found = fault(damaged, wanted, tmp_path / "converted", meant)
        unknowable = found == "other weights" and told_as_the_other_half(content, changed)
        if found and not unknowable:
            faults[seed] = found
    assert faults == {}


def test_there_are_enough_of_them() -> None:
    assert sum(target.count for target in TARGETS) >= 2000
    assert all(target.count % BATCH == 0 for target in TARGETS)
