"""config.json and generation_config.json, put together from the metadata of a GGUF file.

In: metadata, and the facts that only the tensors tell. Out: both files, with the field names of the released ones. The
keys are those of llama.cpp's converter (`TextModel.set_gguf_parameters` in conversion/base.py, `Qwen3NextModel` and
`_Qwen35MtpMixin` in conversion/qwen.py of github.com/ggml-org/llama.cpp).
"""

import json
import math
from pathlib import Path
from typing import Any

from qwen_mlx.config import FULL, LINEAR
from qwen_mlx.convert.gguf_file import Metadata

ARCHITECTURES = {"qwen35": "qwen3_5", "qwen35moe": "qwen3_5_moe"}
MOST_LAYERS = 1024  # llama.cpp's limit is 512
SAMPLING = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}


def config(metadata: Metadata, *, vocab_size: int, tied: bool, eos_token_ids: list[int]) -> dict[str, Any]:
    """What config.json says; `CheckpointError` for a key that is missing or that no Qwen3.5 has."""
    name = metadata.text("general.architecture")
    model_type, moe = ARCHITECTURES[name], name.endswith("moe")

    def size(key: str, default: int | None = None) -> int:
        return metadata.size(f"{name}.{key}", default)

    mtp_layers = size("nextn_predict_layers") if f"{name}.nextn_predict_layers" in metadata.values else 0
    layers = size("block_count") - mtp_layers
    if not 0 < layers <= MOST_LAYERS:
        raise metadata.wrong(f"{name}.block_count", f"between {mtp_layers + 1} and {MOST_LAYERS}")
    every = size("full_attention_interval", 4)  # llama.cpp's default too; the names of the tensors tell if it is wrong
    value_heads, value_size = size("ssm.time_step_rank"), size("ssm.inner_size")
    if value_size % value_heads or value_heads % size("ssm.group_count"):
        wanted = "a multiple of ssm.group_count and a divisor of ssm.inner_size"
        raise metadata.wrong(f"{name}.ssm.time_step_rank", wanted)
    text = {
        "attention_bias": False,
        "attn_output_gate": True,
        "full_attention_interval": every,
        "head_dim": size("attention.key_length"),
        "hidden_act": "silu",
        "hidden_size": size("embedding_length"),
        "layer_types": [LINEAR if (i + 1) % every else FULL for i in range(layers)],
        "linear_conv_kernel_dim": size("ssm.conv_kernel"),
        "linear_key_head_dim": size("ssm.state_size"),
        "linear_num_key_heads": size("ssm.group_count"),
        "linear_num_value_heads": value_heads,
        "linear_value_head_dim": value_size // value_heads,
        "mamba_ssm_dtype": "float32",
        "max_position_embeddings": size("context_length"),
        "model_type": f"{model_type}_text",
        "mtp_num_hidden_layers": mtp_layers,
        "mtp_use_dedicated_embeddings": False,
        "num_attention_heads": size("attention.head_count"),
        "num_hidden_layers": layers,
        "num_key_value_heads": size("attention.head_count_kv"),
        "rms_norm_eps": metadata.number(f"{name}.attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope_parameters(metadata, name),
        "tie_word_embeddings": tied,
        "vocab_size": vocab_size,
    }
    if moe:
        text |= {
            "moe_intermediate_size": size("expert_feed_forward_length"),
            "num_experts": size("expert_count"),
            "num_experts_per_tok": size("expert_used_count"),
            "shared_expert_intermediate_size": size("expert_shared_feed_forward_length"),
        }
    else:
        text["intermediate_size"] = size("feed_forward_length")
    return {
        "architectures": [f"Qwen3_5{'Moe' if moe else ''}ForConditionalGeneration"],
        "eos_token_id": eos_token_ids,
        "model_type": model_type,
        "text_config": text,
        "tie_word_embeddings": tied,
    }


def _rope_parameters(metadata: Metadata, name: str) -> dict[str, Any]:
    scaling = f"{name}.rope.scaling.type"
    if scaling in metadata.values and metadata.text(scaling) != "none":
        raise metadata.wrong(scaling, "absent or 'none', since longer contexts by scaling are not supported")
    sections = f"{name}.rope.dimension_sections"
    *axes, fourth = metadata.integers(sections) or [0]
    if len(axes) != 3 or fourth or min(axes) < 0:
        raise metadata.wrong(sections, "three sizes and a 0")
    return {
        "mrope_interleaved": True,
        "mrope_section": axes,
        "partial_rotary_factor": metadata.size(f"{name}.rope.dimension_count")
        / metadata.size(f"{name}.attention.key_length"),
        "rope_theta": metadata.number(f"{name}.rope.freq_base"),
        "rope_type": "default",
    }


def generation_config(metadata: Metadata) -> dict[str, Path | bytes]:
    """generation_config.json with what the converter copied from there; no file when it copied nothing."""
    stated = {}
    for theirs, ours in SAMPLING.items():
        if (value := metadata.values.get(key := f"general.sampling.{theirs}")) is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise metadata.wrong(key, "a number")
        stated[ours] = value
    return {"generation_config.json": json.dumps(stated, indent=2).encode()} if stated else {}
