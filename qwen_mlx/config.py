"""config.json to frozen dataclasses with its own field names.

In: a model folder. Out: `ModelConfig`. Every value the model needs must be in the file: no default stands in for a
missing one, because class defaults are not the released values. Knows no tensors; how they are quantized is read off
the tensors themselves.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_mlx.errors import CheckpointError

FULL, LINEAR = "full_attention", "linear_attention"
LARGEST = 2**24  # no size of a model comes near, and MLX counts rows and columns in 32 bits
MOST_LAYERS = 1000
LARGEST_FLOAT = 3e38  # in float32
DEPTH = 64  # objects and lists inside each other
MODEL_TYPES = ("qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text")


@dataclass(frozen=True)
class Yarn:
    """Rotary positions stretched by `factor` beyond those of the training (Peng et al. 2023, arXiv 2309.00071)."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float
    truncate: bool
    attention_factor: float  # of the rotated part of queries and of keys


@dataclass(frozen=True)
class RopeParameters:
    rope_theta: float
    partial_rotary_factor: float
    mrope_section: tuple[int, int, int]
    yarn: Yarn | None = None  # where rope_type says so


@dataclass(frozen=True)
class MoeConfig:
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    shared_expert_intermediate_size: int


@dataclass(frozen=True)
class TextConfig:
    hidden_size: int
    num_hidden_layers: int
    layer_types: tuple[str, ...]
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_parameters: RopeParameters
    tie_word_embeddings: bool
    intermediate_size: int  # 0 in a mixture-of-experts model
    moe: MoeConfig | None

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.rope_parameters.partial_rotary_factor)

    @property
    def context_length(self) -> int:
        """Tokens that the positions are made for; the model cards leave max_position_embeddings where YaRN is added."""
        yarn = self.rope_parameters.yarn
        stretched = int(yarn.factor * yarn.original_max_position_embeddings) if yarn else 0
        return max(self.max_position_embeddings, stretched)


@dataclass(frozen=True)
class ModelConfig:
    model_type: str
    text: TextConfig
    eos_token_ids: tuple[int, ...]  # the union of what config.json and generation_config.json name
    generation: Mapping[str, Any]  # generation_config.json, empty when the checkpoint has none


def read_config(folder: Path) -> ModelConfig:
    """Read config.json and generation_config.json of `folder`.

    Raises `CheckpointError` for a folder without config.json, another architecture, a missing value, a size that is
    not a positive integer, and values that contradict each other.
    """
    generation = read_generation(folder)
    return parse_config(read_json(folder / "config.json"), generation, folder)


def read_generation(folder: Path) -> dict[str, Any]:
    """generation_config.json of `folder`; empty where there is none."""
    file = folder / "generation_config.json"
    return read_json(file) if file.exists() else {}


def parse_config(raw: Mapping[str, Any], generation: Mapping[str, Any], folder: Path) -> ModelConfig:
    """The contents of config.json and generation_config.json; `folder` is where they are said to come from."""
    model_type = raw.get("model_type")
    if model_type not in MODEL_TYPES:
        raise CheckpointError(
            f"{folder} holds a model of type {model_type!r}; qwen_mlx runs Qwen3.5 only ({', '.join(MODEL_TYPES)})."
        )
    nested = _object(raw, "text_config") if "text_config" in raw else raw
    for source in (raw, nested):
        # MLX's own quantization names no method, and is read off the tensors.
        method = source.get("quantization_config") and _object(source, "quantization_config").get("quant_method")
        if method is not None:
            raise CheckpointError(
                f"{folder} is quantized by {method!r}, which cannot be run as it is; take the unquantized release or "
                "an MLX conversion."
            )
    return ModelConfig(
        model_type=model_type,
        text=_text_config(nested, raw, has_experts="moe" in model_type),
        eos_token_ids=_eos_token_ids(raw, nested, generation),
        generation=generation,
    )


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; `CheckpointError` when there is no such file or it holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} is not a model folder: it has no {path.name}.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}.") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, it holds {type(content).__name__}.")
    if _is_deeper(content, DEPTH):
        raise CheckpointError(f"{path} has more than {DEPTH} objects or lists inside each other; download it again.")
    return content


def _is_deeper(content: dict[str, Any] | list[Any], levels: int) -> bool:
    children = content.values() if isinstance(content, dict) else content
    return levels == 0 or any(_is_deeper(child, levels - 1) for child in children if isinstance(child, dict | list))


def _eos_token_ids(*sources: Mapping[str, Any]) -> tuple[int, ...]:
    named = [source["eos_token_id"] for source in sources if source.get("eos_token_id") is not None]
    ids = [i for value in named for i in (value if isinstance(value, list) else [value])]
    for i in ids:
        if isinstance(i, bool) or not isinstance(i, int) or i < 0:
            raise CheckpointError(f"eos_token_id must be a token id or a list of them, it holds {i!r}.")
    return tuple(sorted(set(ids)))


def _text_config(nested: Mapping[str, Any], raw: Mapping[str, Any], *, has_experts: bool) -> TextConfig:
    layers = _size(nested, "num_hidden_layers", MOST_LAYERS)
    text = TextConfig(
        hidden_size=_size(nested, "hidden_size"),
        num_hidden_layers=layers,
        layer_types=_layer_types(nested, layers),
        num_attention_heads=_size(nested, "num_attention_heads"),
        num_key_value_heads=_size(nested, "num_key_value_heads"),
        head_dim=_size(nested, "head_dim"),
        linear_num_key_heads=_size(nested, "linear_num_key_heads"),
        linear_num_value_heads=_size(nested, "linear_num_value_heads"),
        linear_key_head_dim=_size(nested, "linear_key_head_dim"),
        linear_value_head_dim=_size(nested, "linear_value_head_dim"),
        linear_conv_kernel_dim=_size(nested, "linear_conv_kernel_dim"),
        vocab_size=_size(nested, "vocab_size"),
        max_position_embeddings=_size(nested, "max_position_embeddings"),
        rms_norm_eps=_positive(nested, "rms_norm_eps"),
        rope_parameters=_rope_parameters(nested),
        tie_word_embeddings=_tie_word_embeddings(nested, raw),
        intermediate_size=0 if has_experts else _size(nested, "intermediate_size"),
        moe=MoeConfig(
            num_experts=_size(nested, "num_experts"),
            num_experts_per_tok=_size(nested, "num_experts_per_tok"),
            moe_intermediate_size=_size(nested, "moe_intermediate_size"),
            shared_expert_intermediate_size=_size(nested, "shared_expert_intermediate_size"),
        )
        if has_experts
        else None,
    )
    _check_agreement(text, nested)
    return text


def _require(source: Mapping[str, Any], name: str) -> Any:
    if source.get(name) is None:
        raise CheckpointError(f"config.json lacks {name}; take the file of the original release.")
    return source[name]


def _size(source: Mapping[str, Any], name: str, most: int = LARGEST) -> int:
    value = _require(source, name)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
        raise CheckpointError(f"config.json: {name} must be a positive integer, it is {value!r}.")
    if value > most:
        raise CheckpointError(f"config.json: {name} is {value}, and no model has more than {most}; download it again.")
    return value


def _positive(source: Mapping[str, Any], name: str) -> float:
    value = _require(source, name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= LARGEST_FLOAT:
        raise CheckpointError(f"config.json: {name} must be a positive number, it is {value!r}.")
    return float(value)


def _object(source: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = _require(source, name)
    if not isinstance(value, dict):
        raise CheckpointError(f"config.json: {name} must be an object, it is {value!r}.")
    return value


def _list(source: Mapping[str, Any], name: str) -> list[Any]:
    value = _require(source, name)
    if not isinstance(value, list):
        raise CheckpointError(f"config.json: {name} must be a list, it is {value!r}.")
    return value


def _tie_word_embeddings(nested: Mapping[str, Any], raw: Mapping[str, Any]) -> bool:
    # Releases say it inside text_config, beside it, or in both places.
    said = [s["tie_word_embeddings"] for s in (nested, raw) if s.get("tie_word_embeddings") is not None]
    if not said:
        _require(nested, "tie_word_embeddings")
    if not isinstance(said[0], bool) or said[0] != said[-1]:
        raise CheckpointError(
            f"config.json: tie_word_embeddings must be true or false, the same in text_config and beside it; it is "
            f"{' and '.join(map(repr, said))}."
        )
    return said[0]


def _layer_types(nested: Mapping[str, Any], layers: int) -> tuple[str, ...]:
    if nested.get("layer_types") is not None:
        types = _list(nested, "layer_types")
    else:
        every = _size(nested, "full_attention_interval")
        types = [FULL if (i + 1) % every == 0 else LINEAR for i in range(layers)]
    if any(kind not in (FULL, LINEAR) for kind in types) or len(types) != layers or FULL not in types:
        raise CheckpointError(
            f"config.json: layer_types must name {layers} layers, each {FULL} or {LINEAR} and one at least {FULL}; "
            f"it names {len(types)}: {', '.join(sorted({str(kind) for kind in types}))}."
        )
    return tuple(types)


def _rope_parameters(nested: Mapping[str, Any]) -> RopeParameters:
    rope = _object(nested, "rope_parameters")
    # mlx-lm writes the kind of rotary embedding as `type`.
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "yarn"):
        raise CheckpointError(f"config.json: rope_type {kind!r} is not supported; only 'default' and 'yarn' are.")
    section = _list(rope, "mrope_section")
    if len(section) != 3 or any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in section):
        raise CheckpointError(f"config.json: mrope_section must be three sizes, it is {section!r}.")
    time, height, width = section
    factor = rope if "partial_rotary_factor" in rope else nested
    return RopeParameters(
        _positive(rope, "rope_theta"),
        _positive(factor, "partial_rotary_factor"),
        (time, height, width),
        _yarn(rope) if kind == "yarn" else None,
    )


def _yarn(rope: Mapping[str, Any]) -> Yarn:
    """The defaults are those of the paper, which transformers takes as well."""
    given = {name: _positive(rope, name) for name in _YARN_OPTIONS if rope.get(name) is not None}
    factor, truncate = _positive(rope, "factor"), rope.get("truncate", True)
    fast, slow = given.get("beta_fast", 32.0), given.get("beta_slow", 1.0)
    if factor < 1 or fast < slow or _positive(rope, "rope_theta") <= 1:
        raise CheckpointError(
            "config.json: YaRN needs a factor of at least 1, beta_fast not below beta_slow and rope_theta above 1; "
            f"they are {factor:g}, {fast:g}, {slow:g} and {rope['rope_theta']:g}."
        )
    if not isinstance(truncate, bool):
        raise CheckpointError(f"config.json: truncate must be true or false, it is {truncate!r}.")
    scales = [0.1 * given.get(name, 1.0) * math.log(factor) + 1 for name in ("mscale", "mscale_all_dim")]
    paired = "mscale" in given and "mscale_all_dim" in given
    attention = scales[0] / scales[1] if paired else 0.1 * math.log(factor) + 1
    return Yarn(
        factor=factor,
        original_max_position_embeddings=_size(rope, "original_max_position_embeddings"),
        beta_fast=fast,
        beta_slow=slow,
        truncate=truncate,
        attention_factor=given.get("attention_factor", attention),
    )


_YARN_OPTIONS = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor")


def _check_agreement(text: TextConfig, nested: Mapping[str, Any]) -> None:
    for many, few in (
        ("num_attention_heads", "num_key_value_heads"),
        ("linear_num_value_heads", "linear_num_key_heads"),
    ):
        a, b = getattr(text, many), getattr(text, few)
        if a % b:
            raise CheckpointError(f"config.json: {many} ({a}) must be a multiple of {few} ({b}).")
    for sizes, rows in (
        ("num_attention_heads x head_dim", 2 * text.num_attention_heads * text.head_dim),
        ("linear_num_key_heads x linear_key_head_dim", 2 * text.linear_num_key_heads * text.linear_key_head_dim),
        ("linear_num_value_heads x linear_value_head_dim", text.linear_num_value_heads * text.linear_value_head_dim),
    ):
        if rows > LARGEST:
            raise CheckpointError(f"config.json: {sizes} is {rows}, and no model has more than {LARGEST}.")
    rotary, section = text.rotary_dim, text.rope_parameters.mrope_section
    if rotary == 0 or rotary % 2 or rotary > text.head_dim or 2 * sum(section) != rotary:
        raise CheckpointError(
            f"config.json: mrope_section {list(section)} must sum to half of the {rotary} rotary dimensions "
            f"(head_dim {text.head_dim} x partial_rotary_factor {text.rope_parameters.partial_rotary_factor})."
        )
    if text.moe and text.moe.num_experts_per_tok > text.moe.num_experts:
        raise CheckpointError(
            f"config.json: num_experts_per_tok ({text.moe.num_experts_per_tok}) exceeds "
            f"num_experts ({text.moe.num_experts})."
        )
    for name, only in (("hidden_act", "silu"), ("attention_bias", False), ("attn_output_gate", True)):
        if nested.get(name, only) != only:
            raise CheckpointError(f"config.json: {name} {nested[name]!r} is not supported; Qwen3.5 has {only!r}.")
