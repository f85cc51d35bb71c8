"""GGUF files of the golden checkpoints, as llama.cpp's converter would write them, through llama.cpp's own writer.

In: a golden checkpoint, a number format. Out: a file. What is done to names and values restates conversion/qwen.py and
conversion/base.py of github.com/ggml-org/llama.cpp: one head at a time, and without anything of `qwen_mlx`.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np

from tests.golden.checkpoints import ENDOFTEXT, IM_END, ORDINARY_IDS, REAL_IDS, VOCAB_SIZE
from tests.real_tokenizer import ADDED_SPECIAL

Arrays = dict[str, np.ndarray]
TEMPLATE = "{{ messages[0].content }} ü"
NAMES = {
    "model.language_model.embed_tokens": "token_embd",
    "model.language_model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "linear_attn.in_proj_qkv": "attn_qkv",
    "linear_attn.in_proj_z": "attn_gate",
    "linear_attn.in_proj_a": "ssm_alpha",
    "linear_attn.in_proj_b": "ssm_beta",
    "linear_attn.conv1d": "ssm_conv1d",
    "linear_attn.A_log": "ssm_a",
    "linear_attn.dt_bias": "ssm_dt.bias",
    "linear_attn.norm": "ssm_norm",
    "linear_attn.out_proj": "ssm_out",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mtp.fc": "nextn.eh_proj",
    "mtp.pre_fc_norm_embedding": "nextn.enorm",
    "mtp.pre_fc_norm_hidden": "nextn.hnorm",
    "mtp.norm": "nextn.shared_head_norm",
}
ALWAYS_FLOAT32 = ("_norm.weight", "ssm_conv1d.weight", "ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight")


def text_config(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "config.json").read_text())["text_config"]


def float32(checkpoint: Path) -> Arrays:
    """The released tensors, which float32 holds exactly; gate and up of the experts apart."""
    arrays: Arrays = {}
    for name, array in mx.load(str(checkpoint / "model.safetensors")).items():
        values = np.array(array.astype(mx.float32))
        if name.endswith("experts.gate_up_proj"):
            halves = np.split(values, 2, axis=1)
            arrays |= {
                name.replace("gate_up_proj", f"{kind}_proj.weight"): h for kind, h in zip(("gate", "up"), halves)
            }
        else:
            arrays[name + ".weight" if name.endswith("experts.down_proj") else name] = values
    return arrays


def gguf_name(name: str, layers: int) -> str:
    """The name in the file; the layers of the MTP head follow those of the trunk."""
    stem, weight, _ = name.partition(".weight")
    parts = stem.removeprefix("model.language_model.").split(".", 3)
    if "layers" not in parts:
        return (f"blk.{layers}." if stem.startswith("mtp.") else "") + NAMES[stem] + weight
    if parts[0] == "mtp":
        number, rest = layers + int(parts[2]), parts[3]
    else:
        number, rest = int(parts[1]), ".".join(parts[2:])
    return f"blk.{number}.{NAMES[rest]}{weight}"


def as_converted(checkpoint: Path) -> Arrays:
    """Names and float32 values as the converter makes them, before they are rounded or quantized."""
    text = text_config(checkpoint)
    return {
        gguf_name(name, text["num_hidden_layers"]): _converted(name, values, text)
        for name, values in float32(checkpoint).items()
    }


def _converted(name: str, values: np.ndarray, text: dict[str, Any]) -> np.ndarray:
    if "linear_attn." not in name:
        # The two norms of the MTP head are called enorm and hnorm by then.
        one_plus = name.endswith("norm.weight") or name.startswith("mtp.pre_fc_norm_")
        return values + np.float32(1) if one_plus else values
    kind = name.partition("linear_attn.")[2].partition(".")[0]
    keys = 2 * text["linear_num_key_heads"] * text["linear_key_head_dim"]
    if kind == "conv1d":
        values = values[:, 0]
    if kind in ("in_proj_qkv", "conv1d"):
        return np.concatenate([values[:keys], tiled(values[keys:], text)])
    if kind == "out_proj":
        return np.ascontiguousarray(tiled(values.T, text).T)
    if kind == "norm":
        return values
    values = tiled(values, text)
    return -np.exp(values) if kind == "A_log" else values


def tiled(values: np.ndarray, text: dict[str, Any]) -> np.ndarray:
    """The value heads along the first axis: first one of each key head, then the second one of each, and so on."""
    key_heads, value_heads = text["linear_num_key_heads"], text["linear_num_value_heads"]
    repeats = value_heads // key_heads
    heads = np.split(values, value_heads)
    return np.concatenate([heads[key_head * repeats + n] for n in range(repeats) for key_head in range(key_heads)])


def stored_type(name: str, values: np.ndarray, kind: str) -> gguf.GGMLQuantizationType:
    wide = values.ndim == 1 or name.endswith(ALWAYS_FLOAT32)
    return gguf.GGMLQuantizationType["F32" if wide else kind]


def small_vocabulary() -> tuple[list[str], list[int], list[str]]:
    """Tokens, types and merges for the golden checkpoints: ordinary ones of the demo model, 16 added ones, padding."""
    model = json.loads((Path(__file__).parents[2] / "qwen_mlx" / "demo" / "tokenizer.json").read_text("utf-8"))["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)[:ORDINARY_IDS]
    merges = [" ".join(pair) for pair in model["merges"][: ORDINARY_IDS - 256]]
    return *with_added(tokens, dict(list(ADDED_SPECIAL.items())[: REAL_IDS - ORDINARY_IDS]), VOCAB_SIZE), merges


def with_added(tokens: list[str], added: dict[str, bool], rows: int) -> tuple[list[str], list[int]]:
    """All tokens and their types: what looks like <|this|> is a control token whatever the tokenizer says."""
    control, user_defined = gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED
    kinds = [
        control if special or (text.startswith("<|") and text.endswith("|>")) else user_defined
        for text, special in added.items()
    ]
    known = [*tokens, *added]
    padding = [f"[PAD{i}]" for i in range(len(known), rows)]
    types = [gguf.TokenType.NORMAL] * len(tokens) + kinds + [gguf.TokenType.UNUSED] * len(padding)
    return known + padding, [int(kind) for kind in types]


def add_tokenizer(
    writer: gguf.GGUFWriter, tokens: list[str], types: list[int], merges: list[str], *, eos: int, pad: int
) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen35")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_eos_token_id(eos)
    writer.add_pad_token_id(pad)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)


def write(
    path: Path,
    checkpoint: Path,
    kind: str,
    *,
    mtp: bool = True,
    tensors_per_file: int = 0,
    change: Callable[[gguf.GGUFWriter], object] = lambda writer: None,
) -> Path:
    """The checkpoint in number format `kind`, in files of `tensors_per_file` unless 0; `change` has the last word."""
    text = text_config(checkpoint)
    writer = gguf.GGUFWriter(
        path, "qwen35moe" if "num_experts" in text else "qwen35", split_max_tensors=tensors_per_file
    )
    add_parameters(writer, text, mtp=mtp)
    add_tokenizer(writer, *small_vocabulary(), eos=IM_END, pad=ENDOFTEXT)
    for name, values in as_converted(checkpoint).items():
        if mtp or not name.startswith(f"blk.{text['num_hidden_layers']}."):
            stored = stored_type(name, values, kind)
            writer.add_tensor(name, gguf.quantize(values, stored), raw_dtype=stored)
    change(writer)
    finish(writer)
    return path


def add_parameters(writer: gguf.GGUFWriter, text: dict[str, Any], *, mtp: bool) -> None:
    """As `set_gguf_parameters` of the classes that the converter puts together, and the metadata of the sampling."""
    writer.add_sampling_top_k(20)
    writer.add_sampling_top_p(0.95)
    writer.add_sampling_temp(1.0)
    heads = mtp * text["mtp_num_hidden_layers"]
    writer.add_block_count(text["num_hidden_layers"] + heads)
    writer.add_context_length(text["max_position_embeddings"])
    writer.add_embedding_length(text["hidden_size"])
    writer.add_head_count(text["num_attention_heads"])
    writer.add_head_count_kv(text["num_key_value_heads"])
    writer.add_key_length(text["head_dim"])
    writer.add_value_length(text["head_dim"])
    writer.add_layer_norm_rms_eps(text["rms_norm_eps"])
    rope = text["rope_parameters"]
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(text["head_dim"] * rope["partial_rotary_factor"]))
    writer.add_rope_dimension_sections([*rope["mrope_section"], 0])
    writer.add_ssm_conv_kernel(text["linear_conv_kernel_dim"])
    writer.add_ssm_state_size(text["linear_key_head_dim"])
    writer.add_ssm_group_count(text["linear_num_key_heads"])
    writer.add_ssm_time_step_rank(text["linear_num_value_heads"])
    writer.add_ssm_inner_size(text["linear_value_head_dim"] * text["linear_num_value_heads"])
    writer.add_full_attention_interval(text["full_attention_interval"])
    if heads:
        writer.add_nextn_predict_layers(heads)
    if "num_experts" in text:
        writer.add_expert_count(text["num_experts"])
        writer.add_expert_used_count(text["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(text["moe_intermediate_size"])
        writer.add_expert_shared_feed_forward_length(text["shared_expert_intermediate_size"])
    else:
        writer.add_feed_forward_length(text["intermediate_size"])
    writer.add_quantization_version(2)


def with_tensor(
    name: str, values: np.ndarray, kind: gguf.GGMLQuantizationType | None = None
) -> Callable[[gguf.GGUFWriter], None]:
    """A change for `write`: this tensor instead of the one of its name."""

    def change(writer: gguf.GGUFWriter) -> None:
        writer.tensors[0].pop(name, None)
        writer.add_tensor(name, values, raw_dtype=kind)

    return change


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def patch(file: Path, start: int, data: bytes) -> None:
    """Overwrite a part of the file."""
    content = bytearray(file.read_bytes())
    content[start : start + len(data)] = data
    file.write_bytes(content)
