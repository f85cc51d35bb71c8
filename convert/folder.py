"""The folder that a conversion writes: weights in shards, sidecars, config.json, index, tokenizer, account.

Until its end everything stands in a folder beside the final one, with ".partial" behind its name. A run that broke off
leaves its finished files there, and the same request goes on from them.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.nn as nn

from qwen_mlx import __version__
from qwen_mlx.convert.opened import Opened
from qwen_mlx.convert.plan import Forms, exact_gains, plan
from qwen_mlx.convert.progress import tensors_through
from qwen_mlx.convert.save import copy_companions, draft_config, model_config, write_index, write_json
from qwen_mlx.convert.stream import Item, shards, write_file
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
        return self.mlx_path.with_name(self.mlx_path.name + ".partial")


def write(opened: Opened, request: Request) -> tuple[dict[str, Any], list[str]]:
    """Write all but card and proof to `request.partial`.

    Returns the account, and the modules that should have been quantized and could not be. Raises `CheckpointError`
    for what turns out wrong in the source as it is read.
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
    _write_files(request.partial, files)
    kept = {"mtp": keeps_mtp, "vision": bool(vision.items)}
    config = model_config(source, text, opened.config.text.tie_word_embeddings, dtype=request.dtype, **kept)
    write_json(request.partial / "config.json", config)
    if keeps_mtp:
        write_json((request.partial / DRAFT_FILE).with_name("config.json"), draft_config(config, draft))
    count = sum(array.size for array in parameters(Qwen(opened.config)).values())
    write_index(request.partial, main, count)
    copy_companions(source, request.partial)
    account = {
        "qwen_mlx": __version__,
        **request.account,
        "dtype": request.dtype,
        "bits_per_weight": round(8 * text.nbytes / count, 3),
        "bytes": sum(item.nbytes for items in files.values() for item in items),
        "kept": kept,
    }
    return account, odd


def finish(request: Request) -> None:
    """Give the partial folder its final name, in the place of what had it before."""
    for mark in (REQUEST, TUNED):
        (request.partial / mark).unlink(missing_ok=True)
    old = request.mlx_path.with_name(request.mlx_path.name + ".old")
    if request.mlx_path.exists():
        request.mlx_path.rename(old)
    request.partial.rename(request.mlx_path)
    shutil.rmtree(old, ignore_errors=True)


def _begin(request: Request, source: Path, files: Files) -> None:
    """An empty partial folder, or that of an earlier run of the same request on the same files."""
    read = sorted(source.rglob("*") if source.is_dir() else source.parent.glob("*.gguf"))
    facts = [(path.name, path.stat()) for path in read if path.is_file()]
    outputs = {name: [output for item in items for output in item.outputs] for name, items in files.items()}
    wanted = json.dumps(
        {
            "version": __version__,
            "account": dict(request.account),
            "source": [[name, fact.st_size, fact.st_mtime_ns] for name, fact in facts],
            "files": {name: [[o.name, list(o.shape), str(o.dtype)] for o in found] for name, found in outputs.items()},
        }
    )
    said = request.partial / REQUEST
    if not (said.exists() and said.read_text(encoding="utf-8") == wanted):
        shutil.rmtree(request.partial, ignore_errors=True)
        request.partial.mkdir(parents=True)
        said.write_text(wanted, encoding="utf-8")
    for file in request.partial.rglob("*.unfinished"):
        file.unlink()


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
