"""What a conversion reads: the tensors of a checkpoint under the names of our modules, rows at a time.

Nothing is read before it is asked for, and no more than is asked for, so a converter needs memory for a few rows.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx


@dataclass(frozen=True)
class Tensor:
    """`rows(start, stop)` reads that part of the first axis, in `dtype`."""

    shape: tuple[int, ...]
    dtype: mx.Dtype
    rows: Callable[[int, int], mx.array]


@dataclass(frozen=True)
class Source:
    """A checkpoint of any kind. Gains are 1 + w in float32 everywhere, convolutions [Cn, K], experts apart."""

    kind: str  # "released", "FP8", "MLX", "qwen_mlx" or "GGUF"
    config: dict[str, Any]  # as in config.json
    text: dict[str, Tensor]  # `model.layers.0.mlp.up_proj.weight`, `lm_head.weight`
    mtp: dict[str, Tensor] = field(default_factory=dict)  # bare: `fc.weight`, `layers.0.self_attn.q_proj.weight`
    vision: dict[str, Tensor] = field(default_factory=dict)  # `vision_tower.*`, shapes as in the MLX layout
    files: dict[str, Path | bytes] = field(default_factory=dict)  # tokenizer, template, ...: a file, or what it holds
