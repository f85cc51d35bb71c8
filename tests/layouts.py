"""Checkpoints of other layouts, derived from a released one in plain code: names and values as its writers make them.

In: a golden checkpoint. Out: its tensors in the layout asked for, and folders that hold them.
"""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx

Tensors = dict[str, mx.array]
ONE_PLUS = ("input_layernorm.weight", "post_attention_layernorm.weight", "q_norm.weight", "k_norm.weight")


def released(source: Path) -> Tensors:
    """The tensors of a golden checkpoint as they are."""
    return dict(mx.load(str(source / "model.safetensors")))


def is_gain(name: str) -> bool:
    """Whether the tensor of this released name is stored as w, for a gain of 1 + w."""
    return name.endswith(ONE_PLUS) or name.endswith("language_model.norm.weight")


def text_only(tensors: Tensors) -> Tensors:
    """As `Qwen3_5ForCausalLM` saves itself: without the level of the multimodal model."""
    return {name.replace("model.language_model.", "model."): array for name, array in trunk(tensors).items()}


def trunk(tensors: Tensors) -> Tensors:
    return {name: array for name, array in tensors.items() if not name.startswith("mtp.")}


def draft_head(tensors: Tensors) -> Tensors:
    """The tensors of the draft head by bare names, as the release stores them."""
    return {name.removeprefix("mtp."): array for name, array in tensors.items() if name.startswith("mtp.")}


def is_head_gain(name: str) -> bool:
    """Whether the tensor of this bare name of the head is stored as w, for a gain of 1 + w: all of its norms are."""
    return "norm" in name


def absolute_head(head: Tensors) -> Tensors:
    """Gains 1 + w, in float32."""
    return {n: 1 + a.astype(mx.float32) if is_head_gain(n) else a for n, a in head.items()}


def stacked_experts(head: Tensors) -> Tensors:
    """Gate and up projection of all experts apart, under MLX's names."""
    apart = {name: array for name, array in head.items() if ".experts." not in name}
    for name in head.keys() - apart.keys():
        before, kind = name.split("experts.")
        halves = mx.split(head[name], 2, axis=1) if kind == "gate_up_proj" else [head[name]]
        kinds = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
        apart |= {f"{before}switch_mlp.{one}.weight": half for one, half in zip(kinds, halves)}
    return apart


def single_experts(head: Tensors) -> Tensors:
    """A tensor for each expert, as the largest release stores them: `mlp.experts.3.up_proj.weight`."""
    single: Tensors = {}
    for name, array in stacked_experts(head).items():
        before, stacked, kind = name.partition("switch_mlp.")
        single |= {f"{before}experts.{e}.{kind}": one for e, one in enumerate(array)} if stacked else {name: array}
    return single


def exact_gains(tensors: Tensors) -> Tensors:
    """Under MLX names, 1 + w in float32."""
    return {mlx_name(n): 1 + a.astype(mx.float32) for n, a in trunk(tensors).items() if is_gain(n)}


def mlx_layout(tensors: Tensors) -> Tensors:
    """As mlx-lm and mlx-vlm convert: gains 1 + w in the dtype of w, convolutions [C, K, 1], separate gate and up."""
    converted: Tensors = {}
    for name, array in trunk(tensors).items():
        ours = mlx_name(name)
        if is_gain(name):
            converted[ours] = (1 + array.astype(mx.float32)).astype(array.dtype)
        elif name.endswith("conv1d.weight"):
            converted[ours] = array.swapaxes(1, 2)
        elif name.endswith("experts.gate_up_proj"):
            for kind, half in zip(("gate", "up"), mx.split(array, 2, axis=1)):
                converted[ours.replace("experts.gate_up_proj", f"switch_mlp.{kind}_proj.weight")] = half
        elif name.endswith("experts.down_proj"):
            converted[ours.replace("experts.down_proj", "switch_mlp.down_proj.weight")] = array
        else:
            converted[ours] = array
    return converted


def mlx_name(name: str) -> str:
    return re.sub(r"^(model\.language_model|lm_head)\.", _mlx_prefix, name)


def _mlx_prefix(match: re.Match[str]) -> str:
    return "language_model.lm_head." if match[1] == "lm_head" else "language_model.model."


def write(
    folder: Path, source: Path, tensors: Mapping[str, mx.array], file: str = "model.safetensors", made_by: str = "mlx"
) -> Path:
    """`tensors` in `file` of `folder`, with the configuration of `source`."""
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "generation_config.json"):
        shutil.copy(source / name, folder)
    mx.save_safetensors(str(folder / file), dict(tensors), metadata={"format": made_by})
    return folder
