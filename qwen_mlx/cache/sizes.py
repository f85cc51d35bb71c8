"""What the caches of a model take, from its configuration alone."""

import mlx.core as mx

from qwen_mlx.cache.kv import grown
from qwen_mlx.cache.quantized_kv import group_size
from qwen_mlx.config import FULL, TextConfig


def kv_bytes_per_token(config: TextConfig, dtype: mx.Dtype, kv_bits: int | None = None) -> int:
    """Keys and values of one token in all full-attention layers; with `kv_bits`, scales and biases in `dtype` too."""
    elements = 2 * config.layer_types.count(FULL) * config.num_key_value_heads * config.head_dim
    if kv_bits is None:
        return elements * dtype.size
    groups = elements // group_size(kv_bits, config.head_dim)
    return elements * kv_bits // 8 + groups * 2 * dtype.size


def state_bytes(config: TextConfig, dtype: mx.Dtype) -> int:
    """The states of all Gated DeltaNet layers, whatever the length: recurrent ones in float32, and convolutions'."""
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    values = config.linear_num_value_heads * config.linear_value_head_dim
    conv_state = (config.linear_conv_kernel_dim - 1) * (2 * keys + values) * dtype.size
    recurrent_state = values * config.linear_key_head_dim * mx.float32.size
    return (len(config.layer_types) - config.layer_types.count(FULL)) * (conv_state + recurrent_state)


def slab_tokens(prompt: int, new: int, step_size: int) -> int:
    """Tokens that the slabs have room for behind a prompt in chunks of `step_size` and `new` tokens one by one."""
    room = 0
    for end in range(step_size, prompt + step_size, step_size):
        end = min(end, prompt)
        room = room if end <= room else grown(end - min(step_size, end), end)
    while room < prompt + new:
        room = grown(room, room + 1)
    return room
