"""Which tensors a GGUF file of Qwen3.5 holds: its names, ours, and where value heads lie in another order.

In: the text_config of a model. Out: for each name in the file a `Target`. The names are those of gguf-py's constants.py
and tensor_mapping.py (github.com/ggml-org/llama.cpp), which call a GatedDeltaNet "ssm".
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from qwen_mlx.config import FULL

EMBEDDING, HEAD = "token_embd.weight", "output.weight"


@dataclass(frozen=True)
class ValueHeads:
    """From index `first` of an axis to its end lie Hv = `key_heads` x `repeats` value heads of `size` indices each."""

    first: int
    key_heads: int
    repeats: int
    size: int

    def order(self) -> np.ndarray:
        """For each of our indices the one in the file: ours are [Hk, Hv / Hk, size], the file's [Hv / Hk, Hk, size]."""
        tiled = np.arange(self.repeats * self.key_heads * self.size).reshape(self.repeats, self.key_heads, self.size)
        return np.concatenate([np.arange(self.first), self.first + tiled.swapaxes(0, 1).ravel()])


@dataclass(frozen=True)
class Target:
    """A tensor of ours: its name, its shape, and the axis along which the file has its value heads tiled."""

    name: str
    shape: tuple[int, ...]
    rows: ValueHeads | None = None
    columns: ValueHeads | None = None

    @property
    def is_gain(self) -> bool:
        """Whether it is 1 + w; the norm of a GatedDeltaNet is not."""
        return "norm" in self.name and "linear_attn" not in self.name


def text_targets(text: Mapping[str, Any]) -> dict[str, Target]:
    """The tensors of embedding, layers and head."""
    hidden, vocab = text["hidden_size"], text["vocab_size"]
    targets = {
        EMBEDDING: Target("model.embed_tokens.weight", (vocab, hidden)),
        "output_norm.weight": Target("model.norm.weight", (hidden,)),
    }
    if not text["tie_word_embeddings"]:
        targets[HEAD] = Target("lm_head.weight", (vocab, hidden))
    for i, kind in enumerate(text["layer_types"]):
        mixer = _attention(text) if kind == FULL else _gated_deltanet(text)
        targets |= _layer(f"blk.{i}.", f"model.layers.{i}.", mixer | _rest_of_layer(text))
    return targets


def mtp_targets(text: Mapping[str, Any]) -> dict[str, Target]:
    """The tensors of the MTP head, under bare names; none if the file has no such head."""
    hidden, layers = text["hidden_size"], text["num_hidden_layers"]
    targets: dict[str, Target] = {}
    for i in range(text["mtp_num_hidden_layers"]):
        targets |= _layer(f"blk.{layers + i}.", f"layers.{i}.", _attention(text) | _rest_of_layer(text))
    if targets:
        head = {
            "eh_proj.weight": Target("fc.weight", (hidden, 2 * hidden)),
            "enorm.weight": Target("pre_fc_norm_embedding.weight", (hidden,)),
            "hnorm.weight": Target("pre_fc_norm_hidden.weight", (hidden,)),
            "shared_head_norm.weight": Target("norm.weight", (hidden,)),
        }
        targets |= _layer(f"blk.{layers}.nextn.", "", head)
    return targets


def _layer(theirs: str, ours: str, targets: Mapping[str, Target]) -> dict[str, Target]:
    return {theirs + name: Target(ours + t.name, t.shape, t.rows, t.columns) for name, t in targets.items()}


def _attention(text: Mapping[str, Any]) -> dict[str, Target]:
    hidden, size = text["hidden_size"], text["head_dim"]
    queries, keys = text["num_attention_heads"] * size, text["num_key_value_heads"] * size
    return {
        "attn_q.weight": Target("self_attn.q_proj.weight", (2 * queries, hidden)),
        "attn_k.weight": Target("self_attn.k_proj.weight", (keys, hidden)),
        "attn_v.weight": Target("self_attn.v_proj.weight", (keys, hidden)),
        "attn_output.weight": Target("self_attn.o_proj.weight", (hidden, queries)),
        "attn_q_norm.weight": Target("self_attn.q_norm.weight", (size,)),
        "attn_k_norm.weight": Target("self_attn.k_norm.weight", (size,)),
    }


def _gated_deltanet(text: Mapping[str, Any]) -> dict[str, Target]:
    hidden, taps = text["hidden_size"], text["linear_conv_kernel_dim"]
    key_heads, value_heads = text["linear_num_key_heads"], text["linear_num_value_heads"]
    size, keys = text["linear_value_head_dim"], 2 * key_heads * text["linear_key_head_dim"]
    values, repeats = value_heads * size, value_heads // key_heads
    after_keys = ValueHeads(keys, key_heads, repeats, size)
    alone = ValueHeads(0, key_heads, repeats, size)
    one_each = ValueHeads(0, key_heads, repeats, 1)
    targets = {
        "attn_qkv.weight": Target("in_proj_qkv.weight", (keys + values, hidden), rows=after_keys),
        "attn_gate.weight": Target("in_proj_z.weight", (values, hidden), rows=alone),
        "ssm_alpha.weight": Target("in_proj_a.weight", (value_heads, hidden), rows=one_each),
        "ssm_beta.weight": Target("in_proj_b.weight", (value_heads, hidden), rows=one_each),
        "ssm_conv1d.weight": Target("conv1d.weight", (keys + values, taps), rows=after_keys),
        "ssm_a": Target("A_log", (value_heads,), rows=one_each),
        "ssm_dt.bias": Target("dt_bias", (value_heads,), rows=one_each),
        "ssm_norm.weight": Target("norm.weight", (size,)),
        "ssm_out.weight": Target("out_proj.weight", (hidden, values), columns=alone),
    }
    return _layer("", "linear_attn.", targets)


def _rest_of_layer(text: Mapping[str, Any]) -> dict[str, Target]:
    hidden = text["hidden_size"]
    targets = {
        "attn_norm.weight": Target("input_layernorm.weight", (hidden,)),
        "post_attention_norm.weight": Target("post_attention_layernorm.weight", (hidden,)),
    }
    if "num_experts" not in text:
        return targets | _feed_forward("", "mlp.", hidden, text["intermediate_size"])
    experts, size = text["num_experts"], text["moe_intermediate_size"]
    return {
        **targets,
        "ffn_gate_inp.weight": Target("mlp.gate.weight", (experts, hidden)),
        "ffn_gate_exps.weight": Target("mlp.switch_mlp.gate_proj.weight", (experts, size, hidden)),
        "ffn_up_exps.weight": Target("mlp.switch_mlp.up_proj.weight", (experts, size, hidden)),
        "ffn_down_exps.weight": Target("mlp.switch_mlp.down_proj.weight", (experts, hidden, size)),
        "ffn_gate_inp_shexp.weight": Target("mlp.shared_expert_gate.weight", (1, hidden)),
        **_feed_forward("_shexp", "mlp.shared_expert.", hidden, text["shared_expert_intermediate_size"]),
    }


def _feed_forward(suffix: str, prefix: str, hidden: int, size: int) -> dict[str, Target]:
    return {
        f"ffn_gate{suffix}.weight": Target(f"{prefix}gate_proj.weight", (size, hidden)),
        f"ffn_up{suffix}.weight": Target(f"{prefix}up_proj.weight", (size, hidden)),
        f"ffn_down{suffix}.weight": Target(f"{prefix}down_proj.weight", (hidden, size)),
    }
