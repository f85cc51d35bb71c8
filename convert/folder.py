"""The folder that a conversion writes: weights in shards, sidecars, config.json, index, tokenizer, account.

Until its end everything stands in a folder beside the final one, with ".partial" behind its name. A run that broke off
leaves its finished files there, and the same request goes on from them.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.nn as nn

from qwen_mlx import __version__
from qwen_mlx.convert.opened import Opened
from qwen_mlx.convert.plan import Forms, exact_gains, plan
from qwen_mlx.convert.progress import tensors_through
from qwen_mlx.convert.save import ACCOUNT, copy_companions, draft_config, model_config, write_index, write_json
from qwen_mlx.convert.stream import Item, shards, write_file
from qwen_mlx.errors import CheckpointError, ConversionError
from qwen_mlx.load import DTYPES, parameters
from qwen_mlx.model.qwen import Qwen

SHARD = 5 << 30  # bytes, as others cut theirs
GAINS_FILE = "qwen_mlx/gains.safetensors"
DRAFT_FILE = "mtp/model.safetensors"
REQUEST = "request.json"
TUNED = "tuned.done"  # there once the scales have been tuned
Files = dict[str, list[Item]]


@dataclass(frozen=True)
class Request:
    """What is written of a source; `account` is what qwen_mlx.json says of it."""

    mlx_path: Path
    dtype: str
    forms: Forms
    account: Mapping[str, Any]
    vision: bool = True
    mtp: bool = True
    shard: int = SHARD

    @property
    def partial(self) -> Path:
        return beside(self.mlx_path, "partial")


def write(opened: Opened, request: Request) -> dict[str, Any]:
    """Write all but card and proof to `request.partial`; returns the account, without the proof.

    Raises `CheckpointError` for what turns out wrong in the source as it is read, and `ConversionError` for a disk
    that is full.
    """
    source, model, head = opened.source, opened.model(), opened.head()
    dtype, vision_tensors = DTYPES[request.dtype], source.vision if request.vision else {}
    # In the order in which the model uses them.
    text = plan({name: source.text[name] for name in parameters(model)}, model, request.forms, dtype)
    vision = plan(vision_tensors, nn.Module(), lambda path: None, dtype, prefix="")
    main = _shards([*text.items, *vision.items], request.shard)
    files, odd = main | {GAINS_FILE: exact_gains(source.text)}, text.odd
    if keeps_mtp := request.mtp and head is not None:
        draft = plan(source.mtp, head, lambda path: request.forms(f"mtp.{path}"), dtype, prefix="")
        files, odd = files | {DRAFT_FILE: draft.items}, odd + [f"mtp.{path}" for path in draft.odd]
    _begin(request, opened.path, files)
    try:
        _write_files(request.partial, files)
    except CheckpointError:
        clear(request.partial)  # a source that is put right is another one
        raise
    kept = {"mtp": keeps_mtp, "vision": bool(vision.items)}
    config = model_config(source, text, opened.config.text.tie_word_embeddings, dtype=request.dtype, **kept)
    write_json(request.partial / "config.json", config)
    if keeps_mtp:
        write_json((request.partial / DRAFT_FILE).with_name("config.json"), draft_config(config, draft))
    count = sum(array.size for array in parameters(Qwen(opened.config)).values())
    write_index(request.partial, main, count)
    copy_companions(source, request.partial, vision=kept["vision"])
    account = {
        "qwen_mlx": __version__,
        **request.account,
        "dtype": request.dtype,
        "bits_per_weight": round(8 * text.nbytes / count, 3),
        "bytes": sum(item.nbytes for items in files.values() for item in items),
        "kept": kept,
        "dropped": [part for part, wanted in (("mtp", request.mtp), ("vision", request.vision)) if not wanted],
        "left_float": odd,
    }
    return account


def finish(request: Request) -> None:
    """Give the partial folder its final name, in the place of what had it before."""
    old = beside(request.mlx_path, "old")
    if request.mlx_path.exists():
        request.mlx_path.rename(old)
    request.partial.rename(request.mlx_path)
    for mark in (REQUEST, TUNED):
        (request.mlx_path / mark).unlink(missing_ok=True)
    shutil.rmtree(old, ignore_errors=True)


def beside(path: Path, kind: str) -> Path:
    return path.with_name(f"{path.name}.{kind}")


def check_place(mlx_path: Path, source: Path, *, force: bool) -> None:
    """Raises `ConversionError` where writing to `mlx_path` would touch something that is not of a conversion."""
    if not mlx_path.name:
        raise ConversionError(f"--mlx-path {str(mlx_path)!r} has no name of its own; give the folder to write.")
    if mlx_path.exists() and not force:
        raise ConversionError(
            f"{mlx_path} exists already; choose another --mlx-path, or --force to put the new model there."
        )
    if mlx_path.exists() and not (mlx_path / ACCOUNT).is_file():
        raise ConversionError(f"{mlx_path} is no conversion, having no {ACCOUNT}, and --force leaves it; move it away.")
    for taken in (mlx_path, beside(mlx_path, "partial")):
        if taken.resolve() in (source.resolve(), *source.resolve().parents):
            raise ConversionError(f"The source {source} lies in {taken}, which is written; choose another --mlx-path.")
    partial, old = beside(mlx_path, "partial"), beside(mlx_path, "old")
    if partial.exists() and not (partial / REQUEST).exists() and not (partial.is_dir() and not any(partial.iterdir())):
        raise ConversionError(f"{partial} is no unfinished conversion, but has its name; move it away.")
    if old.exists():
        raise ConversionError(f"{old} is in the way, where the folder that is replaced would go; move it away.")


@contextmanager
def claimed(request: Request) -> Iterator[None]:
    """Nobody else writes to the partial folder meanwhile; ConversionError where somebody does."""
    request.partial.mkdir(parents=True, exist_ok=True)
    folder = os.open(request.partial, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise ConversionError(f"Another conversion writes to {request.partial}; wait for it, or stop it.") from None
    finally:
        os.close(folder)


def clear(folder: Path) -> None:
    """Take away what is in `folder`, not the folder itself: it may be claimed."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _begin(request: Request, source: Path, files: Files) -> None:
    """An empty partial folder, or that of an earlier run of the same request on the same files."""
    outputs = {name: [output for item in items for output in item.outputs] for name, items in files.items()}
    wanted = json.dumps(
        {
            "version": __version__,
            "account": {name: value for name, value in request.account.items() if name != "command"},
            "source": [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in _read_from(source)],
            "files": {name: [[o.name, list(o.shape), str(o.dtype)] for o in found] for name, found in outputs.items()},
        }
    )
    request.partial.mkdir(parents=True, exist_ok=True)
    said = request.partial / REQUEST
    if not (said.exists() and said.read_text(encoding="utf-8") == wanted):
        clear(request.partial)
        said.write_text(wanted, encoding="utf-8")
    for file in request.partial.rglob("*.unfinished"):
        file.unlink()


def _read_from(source: Path) -> list[Path]:
    if source.is_file():
        return sorted(source.parent.glob(f"{source.stem.split('-00')[0]}*.gguf"))
    patterns = ("*.json", "*.safetensors", "mtp/*.safetensors", "qwen_mlx/*.safetensors")
    return sorted(path for pattern in patterns for path in source.glob(pattern))


def _write_files(folder: Path, files: Files) -> None:
    waiting = {name: items for name, items in files.items() if not (folder / name).exists()}
    every = [item for items in waiting.values() for item in items]
    with tensors_through("Converting", len(every), sum(item.source_nbytes for item in every)) as advance:
        for name, items in waiting.items():
            write_file(folder / name, items, advance)


def _shards(items: list[Item], limit: int) -> Files:
    """By the names that all readers know."""
    parts = shards(items, limit)
    if len(parts) == 1:
        return {"model.safetensors": parts[0]}
    return {f"model-{i:05}-of-{len(parts):05}.safetensors": part for i, part in enumerate(parts, 1)}
