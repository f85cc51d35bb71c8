"""`python -m qwen_mlx.info`: what a model is, how it would run here and why, and the memory a context of it takes.

From its configuration and the headers of its files: no weight is read.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from qwen_mlx.bench.model_bytes import quantization
from qwen_mlx.bench.table import aligned
from qwen_mlx.cache.quantized_kv import BITS
from qwen_mlx.checkpoint import Checkpoint, open_checkpoint
from qwen_mlx.cli import Parser, positive, run
from qwen_mlx.config import FULL, ModelConfig, read_config
from qwen_mlx.decoding.asked import is_small
from qwen_mlx.decoding.memory import memory_limit
from qwen_mlx.decoding.preflight import MemoryPlan, Request, choose_plan
from qwen_mlx.decoding.sampling import default_params, recommendations
from qwen_mlx.hub import DEFAULT_MODEL, resolve
from qwen_mlx.kernels.backend import gpu_generation
from qwen_mlx.kernels.self_check import checks_for
from qwen_mlx.load import ALWAYS_FLOAT32, DTYPES, auto_dtype, kernel_sizes, parameters, quantize_like
from qwen_mlx.load_mtp import find_mtp
from qwen_mlx.model.qwen import Qwen
from qwen_mlx.tokenizer import Tokenizer

LENGTHS = (4096, 32768, 262144)


@dataclass(frozen=True)
class _Stored:
    """A tensor as a header describes it."""

    shape: tuple[int, ...]
    dtype: mx.Dtype = mx.float32  # not looked at

    @property
    def ndim(self) -> int:
        return len(self.shape)


def describe(
    folder: Path, *, dtype: str = "auto", lengths: Sequence[int] = LENGTHS, kv_bits: int | None = None
) -> dict[str, Any]:
    """All that the command tells of the model in `folder`, as JSON has it; sizes in bytes.

    Raises CheckpointError and TokenizerError as `load` does, for what the headers and the configuration show.
    """
    config, checkpoint = read_config(folder), open_checkpoint(folder)
    model = Qwen(config)
    count = sum(array.size for array in parameters(model).values())
    quantize_like(folder, model, _stored(checkpoint))
    chosen, why = _dtype(dtype)
    weights = _weight_bytes(model, DTYPES[chosen])
    request, limit = Request(config.text, weights, DTYPES[chosen], kv_bits), memory_limit()
    kernels = [kernel.label for kernel in checks_for(*kernel_sizes(config.text, DTYPES[chosen])) if kernel.usable]
    yarn = config.text.rope_parameters.yarn
    return {
        "architecture": _architecture(config),
        "parameters": count,
        "bits_per_parameter": round(8 * sum(h.nbytes for h in checkpoint.headers.values()) / count, 2),
        "quantization": quantization(model),
        "layout": checkpoint.layout,
        "mtp_head": find_mtp(folder) is not None,
        "vision_tower": any("mtp" not in name.split(".") for name in checkpoint.others),
        "dtype": {"value": chosen, "why": why},
        "kernels": kernels,
        "context_length": config.text.context_length,
        "yarn": asdict(yarn) if yarn else None,
        "eos_token_ids": sorted({*config.eos_token_ids, Tokenizer.load(folder).eos_token_id}),
        "sampling": {mode: _sampling(config, thinking=mode == "thinking") for mode in ("answering", "thinking")},
        "memory_limit": limit,
        "memory": [_told(choose_plan(request, length, 0, limit), limit) for length in lengths],
    }


def _stored(checkpoint: Checkpoint) -> dict[str, _Stored]:
    return {checkpoint.names[name]: _Stored(header.shape) for name, header in checkpoint.headers.items()}


def _dtype(asked: str) -> tuple[str, str]:
    generation = gpu_generation()
    if asked != "auto":
        return asked, "asked for"
    if generation is None:
        return auto_dtype(None), "there is no Metal here, and a CPU is slow in 16 bits"
    native = "has bfloat16" if auto_dtype(generation) == "bfloat16" else "has none; bfloat16 if weights exceed float16"
    return auto_dtype(generation), f"of the GPU's generation, {generation}, which {native}"


def _weight_bytes(model: Qwen, dtype: mx.Dtype) -> int:
    """As `load` holds them."""
    total = 0
    for name, array in parameters(model).items():
        floating = mx.issubdtype(array.dtype, mx.floating)
        wide = mx.float32 if name.endswith(ALWAYS_FLOAT32) else dtype
        total += array.size * wide.size if floating else array.nbytes
    return total


def _architecture(config: ModelConfig) -> str:
    text = config.text
    full = text.layer_types.count(FULL)
    layers = f"{len(text.layer_types)} layers ({len(text.layer_types) - full} Gated DeltaNet, {full} full attention)"
    experts = f", {text.moe.num_experts} experts, {text.moe.num_experts_per_tok} a token" if text.moe else ""
    return f"{config.model_type}, {layers}, hidden size {text.hidden_size}{experts}"


def _sampling(config: ModelConfig, *, thinking: bool) -> dict[str, dict[str, Any]]:
    small = is_small(config.text)
    default_params(config.generation, is_small=small, thinking=thinking)  # says what makes no sense
    found = recommendations(config.generation, is_small=small, thinking=thinking)
    return {name: {"value": value, "from": source} for name, (value, source) in found.items()}


def _told(plan: MemoryPlan, limit: int | None) -> dict[str, Any]:
    told = asdict(plan) | {"total": plan.total, "fits": limit is None or plan.total <= limit}
    del told["others"], told["snapshots"]  # nothing is held when nothing is loaded, and one prompt keeps nothing
    return told


def main(arguments: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(arguments)
    found = describe(
        resolve(args.model, revision=args.revision), dtype=args.dtype, lengths=args.lengths, kv_bits=args.kv_bits
    )
    if args.json:
        print(json.dumps({"model": args.model, **found}))
    else:
        print("\n".join(_lines(args.model, found)))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="qwen-mlx info", description="Tell what a model is, how it would run here, and its memory.")
    add = parser.add_argument
    add("model", nargs="?", default=DEFAULT_MODEL, help=f'folder, hub id, or "demo" (default: {DEFAULT_MODEL})')
    add("--revision", help="branch, tag or commit on the hub")
    add("--dtype", choices=("auto", *DTYPES), default="auto", help="dtype of the activations")
    add("--lengths", type=positive, nargs="+", default=LENGTHS, help="contexts in tokens whose memory is counted")
    add("--kv-bits", type=int, choices=BITS, help="count keys and values in so many bits")
    add("--json", action="store_true", help="print one JSON object instead of the table")
    return parser


def _lines(name: str, found: Mapping[str, Any]) -> list[str]:
    yarn, limit = found["yarn"], found["memory_limit"]
    stretched = f", by YaRN of {yarn['original_max_position_embeddings']:,}" if yarn else ""
    facts = {
        "model": name,
        "architecture": found["architecture"],
        "parameters": f"{found['parameters']:,} of the text model, stored in {found['bits_per_parameter']:g} bits each",
        "quantization": found["quantization"],
        "layout": found["layout"],
        "MTP head": "yes" if found["mtp_head"] else "none",
        "vision tower": "yes, not loaded" if found["vision_tower"] else "none",
        "dtype": f"{found['dtype']['value']}: {found['dtype']['why']}",
        "kernels": ", ".join(found["kernels"]) or "plain MLX",
        "context": f"{found['context_length']:,} tokens{stretched}",
        "end tokens": ", ".join(map(str, found["eos_token_ids"])),
        **{mode: _values(found["sampling"][mode]) for mode in ("answering", "thinking")},
        "memory": "of unknown size" if limit is None else f"{limit / 1e9:.2f} GB allowed here",
    }
    width = max(map(len, facts))
    return [f"{what:{width}}  {said}" for what, said in facts.items()] + ["", *_memory_table(found["memory"])]


def _values(sampling: Mapping[str, Mapping[str, Any]]) -> str:
    return ", ".join(f"{name} {said['value']:g} ({said['from']})" for name, said in sampling.items())


def _memory_table(plans: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = [["tokens", "weights", "keys, values", "states", "chunk", "of tokens", "GB in all", ""]]
    for plan in plans:
        sizes = [f"{plan[part] / 1e9:.3f}" for part in ("weights", "keys_values", "states", "prefill")]
        verdict = "" if plan["fits"] else "does not fit"
        rows.append([f"{plan['tokens']:,}", *sizes, str(plan["step_size"]), f"{plan['total'] / 1e9:.3f}", verdict])
    return aligned(rows, left=len(rows[0]) - 1)


if __name__ == "__main__":
    sys.exit(run(main))
