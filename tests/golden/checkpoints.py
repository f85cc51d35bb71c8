"""Six tiny random Qwen3.5 checkpoints in the released Hugging Face layout, from NumPy alone.

In: the name of a variant and a folder. Out: config.json, generation_config.json and model.safetensors there, with text
trunk and MTP head but no vision tensors. The same bytes everywhere: the values come from `numpy.random.RandomState`,
whose stream is frozen. This module knows no model code, neither ours nor anybody's.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

VOCAB_SIZE = 384
"""Rows of the embedding. As in the released files the last ones belong to no token."""
REAL_IDS = 368
"""Tokens there are: ids from here up to VOCAB_SIZE are padding and must never be sampled."""
ORDINARY_IDS = 352
"""Ids below are plain text; the added tokens follow."""
ENDOFTEXT, IM_START, IM_END = ORDINARY_IDS, ORDINARY_IDS + 1, ORDINARY_IDS + 2


@dataclass(frozen=True)
class Variant:
    """Sizes of one checkpoint: hidden size, layers, attention (Hq, Hkv, head_dim), delta rule (Hk, Hv, Dk, Dv)."""

    seed: int
    hidden: int
    attention: tuple[int, int, int]
    delta: tuple[int, int, int, int]
    mrope_section: tuple[int, int, int]
    tied: bool
    layers: int = 4
    intermediate: int = 192
    experts: tuple[int, int, int, int] | None = None
    """A mixture of experts instead of the MLP: experts, chosen per token, their size, size of the shared expert."""


VARIANTS = {
    "a-r1-d32": Variant(101, 128, (4, 2, 64), (4, 4, 32, 32), (3, 3, 2), tied=True),
    "b-r2-d64": Variant(102, 128, (4, 1, 128), (2, 4, 64, 64), (6, 5, 5), tied=False, layers=8, intermediate=256),
    "c-r3-d128": Variant(103, 192, (2, 1, 256), (2, 6, 128, 128), (11, 11, 10), tied=True, intermediate=320),
    "d-moe": Variant(104, 128, (4, 2, 64), (2, 4, 32, 32), (3, 3, 2), tied=False, experts=(8, 2, 64, 128)),
    "e-k64-v32": Variant(105, 128, (6, 3, 32), (2, 6, 64, 32), (2, 1, 1), tied=True),
    "f-k32-v64": Variant(106, 64, (2, 2, 64), (2, 4, 32, 64), (3, 3, 2), tied=False, intermediate=128),
}


def build(variant: str, folder: Path) -> Path:
    """Writes checkpoint `variant` into `folder`, which is created when missing, and returns `folder`."""
    sizes = VARIANTS[variant]
    folder.mkdir(parents=True, exist_ok=True)
    generation = {
        "bos_token_id": ENDOFTEXT,
        "do_sample": True,
        "eos_token_id": [IM_END, ENDOFTEXT],
        "pad_token_id": ENDOFTEXT,
        "temperature": 1.0,
        "top_k": 20,
        "top_p": 0.95,
    }
    (folder / "config.json").write_text(json.dumps(config(sizes), indent=2))
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2))
    random = np.random.RandomState(sizes.seed)
    tensors = {name: _random_tensor(random, name, shape) for name, shape in shapes(sizes).items()}
    _write_safetensors(folder / "model.safetensors", tensors)
    return folder


def config(sizes: Variant) -> dict[str, Any]:
    """The content of config.json."""
    model_type = "qwen3_5_moe" if sizes.experts else "qwen3_5"
    query_heads, kv_heads, head_dim = sizes.attention
    key_heads, value_heads, key_dim, value_dim = sizes.delta
    text = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_output_gate": True,
        "dtype": "bfloat16",
        "eos_token_id": ENDOFTEXT,
        "full_attention_interval": 4,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": sizes.hidden,
        "initializer_range": 0.02,
        "layer_types": [_layer_type(i) for i in range(sizes.layers)],
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": key_dim,
        "linear_num_key_heads": key_heads,
        "linear_num_value_heads": value_heads,
        "linear_value_head_dim": value_dim,
        "mamba_ssm_dtype": "float32",
        "max_position_embeddings": 4096,
        "model_type": model_type + "_text",
        "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False,
        "num_attention_heads": query_heads,
        "num_hidden_layers": sizes.layers,
        "num_key_value_heads": kv_heads,
        "partial_rotary_factor": 0.25,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": list(sizes.mrope_section),
            "partial_rotary_factor": 0.25,
            "rope_theta": 10000000,
            "rope_type": "default",
        },
        "tie_word_embeddings": sizes.tied,
        "use_cache": True,
        "vocab_size": VOCAB_SIZE,
    }
    if sizes.experts:
        experts, chosen, expert_size, shared_size = sizes.experts
        text |= {
            "moe_intermediate_size": expert_size,
            "num_experts": experts,
            "num_experts_per_tok": chosen,
            "output_router_logits": False,
            "router_aux_loss_coef": 0.001,
            "shared_expert_intermediate_size": shared_size,
        }
    else:
        text["intermediate_size"] = sizes.intermediate
    return {
        "architectures": [f"Qwen3_5{'Moe' if sizes.experts else ''}ForConditionalGeneration"],
        "eos_token_id": IM_END,
        "model_type": model_type,
        "pad_token_id": ENDOFTEXT,
        "text_config": text,
        "tie_word_embeddings": sizes.tied,
    }


def shapes(sizes: Variant) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the released layout."""
    hidden, trunk = sizes.hidden, "model.language_model."
    table: dict[str, tuple[int, ...]] = {trunk + "embed_tokens.weight": (VOCAB_SIZE, hidden)}
    for i in range(sizes.layers):
        table |= _layer_shapes(sizes, f"{trunk}layers.{i}.", _layer_type(i))
    table[trunk + "norm.weight"] = (hidden,)
    if not sizes.tied:
        table["lm_head.weight"] = (VOCAB_SIZE, hidden)
    table["mtp.fc.weight"] = (hidden, 2 * hidden)
    table |= {f"mtp.{name}.weight": (hidden,) for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")}
    return table | _layer_shapes(sizes, "mtp.layers.0.", "full_attention")


def _layer_type(layer: int) -> str:
    return "full_attention" if layer % 4 == 3 else "linear_attention"


def _layer_shapes(sizes: Variant, prefix: str, layer_type: str) -> dict[str, tuple[int, ...]]:
    hidden = sizes.hidden
    if layer_type == "full_attention":
        query_heads, kv_heads, head_dim = sizes.attention
        mixer = {
            "self_attn.q_proj.weight": (2 * query_heads * head_dim, hidden),
            "self_attn.k_proj.weight": (kv_heads * head_dim, hidden),
            "self_attn.v_proj.weight": (kv_heads * head_dim, hidden),
            "self_attn.o_proj.weight": (hidden, query_heads * head_dim),
            "self_attn.q_norm.weight": (head_dim,),
            "self_attn.k_norm.weight": (head_dim,),
        }
    else:
        key_heads, value_heads, key_dim, value_dim = sizes.delta
        channels = 2 * key_heads * key_dim + value_heads * value_dim
        mixer = {
            "linear_attn.in_proj_qkv.weight": (channels, hidden),
            "linear_attn.in_proj_z.weight": (value_heads * value_dim, hidden),
            "linear_attn.in_proj_b.weight": (value_heads, hidden),
            "linear_attn.in_proj_a.weight": (value_heads, hidden),
            "linear_attn.conv1d.weight": (channels, 1, 4),
            "linear_attn.A_log": (value_heads,),
            "linear_attn.dt_bias": (value_heads,),
            "linear_attn.norm.weight": (value_dim,),
            "linear_attn.out_proj.weight": (hidden, value_heads * value_dim),
        }
    norms = {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
    return {prefix + name: shape for name, shape in (norms | mixer | _mlp_shapes(sizes)).items()}


def _mlp_shapes(sizes: Variant) -> dict[str, tuple[int, ...]]:
    def gated(prefix: str, intermediate: int) -> dict[str, tuple[int, ...]]:
        return {
            prefix + "gate_proj.weight": (intermediate, sizes.hidden),
            prefix + "up_proj.weight": (intermediate, sizes.hidden),
            prefix + "down_proj.weight": (sizes.hidden, intermediate),
        }

    if not sizes.experts:
        return gated("mlp.", sizes.intermediate)
    experts, _, expert_size, shared_size = sizes.experts
    return {
        "mlp.gate.weight": (experts, sizes.hidden),
        "mlp.experts.gate_up_proj": (experts, 2 * expert_size, sizes.hidden),
        "mlp.experts.down_proj": (experts, sizes.hidden, expert_size),
        "mlp.shared_expert_gate.weight": (1, sizes.hidden),
        **gated("mlp.shared_expert.", shared_size),
    }


def _random_tensor(random: np.random.RandomState, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Values under which every part of the model moves the logits: gains off 1, decays from 0.2 to 0.9995."""
    if name.endswith("A_log"):
        return np.log(random.uniform(1, 16, shape)).astype(np.float32)
    if name.endswith("linear_attn.norm.weight"):
        return (1 + 0.15 * random.standard_normal(shape)).astype(np.float32)
    if name.endswith("dt_bias"):
        step = np.exp(random.uniform(math.log(1e-3), math.log(1e-1), shape))
        return to_bfloat16(step + np.log(-np.expm1(-step)))
    if len(shape) == 1:
        scale = 0.15
    elif "embed_tokens" in name or name.startswith("lm_head"):
        scale = 0.35
    elif name.endswith("conv1d.weight"):
        scale = 0.5
    else:
        scale = shape[-1] ** -0.5
    return to_bfloat16(scale * random.standard_normal(shape))


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """The bits of the nearest bfloat16, ties to even, as uint16."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """uint16 arrays are stored as the bfloat16 they hold. Format: 8 bytes of header length, JSON header, raw values."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, values in tensors.items():
        dtype = "BF16" if values.dtype == np.uint16 else "F32"
        header[name] = {"dtype": dtype, "shape": values.shape, "data_offsets": [start, start + values.nbytes]}
        start += values.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    values_as_bytes = b"".join(values.tobytes() for values in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + values_as_bytes)
