"""What stands in a converted folder beside its weights: config.json, index, tokenizer, the account of its making."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen_mlx.checkpoint import INDEX
from qwen_mlx.convert.plan import Plan
from qwen_mlx.convert.source import Source
from qwen_mlx.convert.stream import Item

ACCOUNT = "qwen_mlx.json"
VISION_KEYS = ("vision_config", "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
DRAFT_BLOCK = 2  # tokens that mlx-vlm's drafter proposes more than it has layers


def write_text(path: Path, text: str) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=4) + "\n")


def write_index(folder: Path, files: Mapping[str, list[Item]], parameters: int) -> None:
    """`files`: by its name what each holds. mlx-lm's server lists no model without an index."""
    where = {output.name: file for file, items in files.items() for item in items for output in item.outputs}
    total = sum(item.nbytes for items in files.values() for item in items)
    metadata = {"total_size": total, "total_parameters": parameters}
    write_json(folder / INDEX, {"metadata": metadata, "weight_map": dict(sorted(where.items()))})


def model_config(source: Source, plan: Plan, tied: bool, *, vision: bool, mtp: bool, dtype: str) -> dict[str, Any]:
    """config.json of the result: what the source says, without what was dropped and how it was quantized."""
    config = {k: v for k, v in source.config.items() if k not in ("quantization", "quantization_config")}
    if "text_config" not in config:
        # transformers saves a text model flat, and mlx-lm knows no such model_type.
        outer = ("architectures", "model_type", "transformers_version")
        text = {k: v for k, v in config.items() if k not in outer}
        config = {k: v for k, v in config.items() if k in outer}
        config |= {"model_type": config["model_type"].removesuffix("_text"), "text_config": text}
        config["text_config"]["model_type"] = config["model_type"] + "_text"
    text = {k: v for k, v in config["text_config"].items() if k != "quantization_config"}
    text |= {"dtype": dtype, "tie_word_embeddings": tied, "mtp_num_hidden_layers": int(mtp)}
    config["text_config"] = text
    for stale in ("dtype", "torch_dtype"):
        config.pop(stale, None)
    if not vision:
        config = {k: v for k, v in config.items() if k not in VISION_KEYS}
        moe = "Moe" if "moe" in config["model_type"] else ""
        config["architectures"] = [f"Qwen3_5{moe}ForCausalLM"]
    if plan.quantization:
        # The second name is the one by which the hub tells that a model is quantized.
        config |= {"quantization": plan.quantization, "quantization_config": plan.quantization}
    return dict(sorted(config.items()))


def draft_config(config: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """mtp/config.json: the form in which mlx-vlm takes a draft head."""
    text = config["text_config"]
    found = {
        "model_type": "qwen3_5_mtp",
        "text_config": text,
        "block_size": text["mtp_num_hidden_layers"] + DRAFT_BLOCK,
        "tie_word_embeddings": text["tie_word_embeddings"],
    }
    return found | ({"quantization": plan.quantization} if plan.quantization else {})


def copy_companions(source: Source, folder: Path, *, vision: bool = False) -> None:
    for name, content in source.files.items():
        if "processor" in name and not vision:
            continue
        if isinstance(content, bytes):
            write_text(folder / name, content.decode("utf-8"))
        else:
            shutil.copyfile(content, folder / name)
