"""A random checkpoint with the shapes of Qwen3.5-0.8B, in the MLX layout, for benchmarks: speed needs no meaning."""

import json
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from qwen_mlx.config import read_config
from qwen_mlx.model.qwen import Qwen

# As released; https://huggingface.co/Qwen/Qwen3.5-0.8B
TEXT_CONFIG = dict(
    model_type="qwen3_5_text", attention_bias=False, attn_output_gate=True, full_attention_interval=4, head_dim=256,
    hidden_act="silu", hidden_size=1024, intermediate_size=3584, linear_conv_kernel_dim=4, linear_key_head_dim=128,
    linear_num_key_heads=16, linear_num_value_heads=16, linear_value_head_dim=128, max_position_embeddings=262144,
    num_attention_heads=8, num_key_value_heads=2, rms_norm_eps=1e-6, tie_word_embeddings=True, vocab_size=248320,
    rope_parameters=dict(mrope_interleaved=True, mrope_section=[11, 11, 10], rope_type="default", rope_theta=1e7,
                         partial_rotary_factor=0.25),
)  # fmt: skip


def make(folder: Path, *, layers: int = 24, bits: int | None = None) -> Path:
    """Write config.json and model.safetensors (bfloat16, or matrices in `bits` bits by 64) unless they are there."""
    if (folder / "model.safetensors").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    text = dict(TEXT_CONFIG, num_hidden_layers=layers)
    config = {"model_type": "qwen3_5", "architectures": ["Qwen3_5ForConditionalGeneration"], "text_config": text,
              "tie_word_embeddings": True, "eos_token_id": []}  # fmt: skip
    if bits:
        config["quantization"] = {"group_size": 64, "bits": bits, "mode": "affine"}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    mx.random.seed(0)
    tensors: dict[str, mx.array] = {}
    for name, parameter in tree_flatten(Qwen(read_config(folder)).parameters()):
        tensors |= _quantized(f"language_model.{name}", _random(name, parameter.shape), bits)
    mx.save_safetensors(str(folder / "partial.safetensors"), tensors, {"format": "mlx"})
    (folder / "partial.safetensors").rename(folder / "model.safetensors")
    return folder


def _random(name: str, shape: tuple[int, ...]) -> mx.array:
    if name.endswith("A_log"):
        return mx.log(mx.random.uniform(0.05, 16, shape))
    if name.endswith("dt_bias"):
        return mx.random.uniform(-4, 1, shape).astype(mx.bfloat16)
    if name.endswith("conv1d.weight"):
        return (0.3 * mx.random.normal((*shape, 1))).astype(mx.bfloat16)
    if name.endswith("norm.weight"):
        return (1 + 0.1 * mx.random.normal(shape)).astype(mx.bfloat16)
    return (0.02 * mx.random.normal(shape)).astype(mx.bfloat16)


def _quantized(name: str, weight: mx.array, bits: int | None) -> dict[str, mx.array]:
    if not bits or weight.ndim != 2:
        return {name: weight}
    packed, scales, biases = mx.quantize(weight, 64, bits)
    path = name.removesuffix(".weight")
    return {name: packed, f"{path}.scales": scales, f"{path}.biases": biases}
