"""The bytes that one decode step must read and write, counted from a loaded model, and the share of a chip's bandwidth.

A bound, not a measurement: each byte once, whatever an engine does. Images and the draft head are not loaded.
"""

from dataclasses import dataclass

import mlx.nn as nn

from qwen_mlx.bench.chips import Chip
from qwen_mlx.cache.sizes import kv_bytes_per_token, state_bytes
from qwen_mlx.load import parameters
from qwen_mlx.model.qwen import Qwen


@dataclass(frozen=True)
class StepBytes:
    """`weights` and `kv` are read; `states`, convolutional and recurrent, are read and written."""

    weights: int
    kv: int
    states: int

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.states

    def share(self, chip: Chip, tokens_per_second: float) -> float:
        """Of the bandwidth published for `chip`, at this rate."""
        return chip.floor_us(self.total) * 1e-6 * tokens_per_second


def step_bytes(model: Qwen, context: float) -> StepBytes:
    """Of the step that draws a token with `context` tokens in the cache, its own input included."""
    text = model.config.text
    return StepBytes(
        _weights(model), round(kv_bytes_per_token(text, model.dtype) * context), 2 * state_bytes(text, model.dtype)
    )


def mean_context(prompt_tokens: int, generated_tokens: int) -> float:
    """Of the steps that are timed: those that draw the second to the last token."""
    return prompt_tokens + generated_tokens / 2


def _weights(model: Qwen) -> int:
    """All that a token meets: of the experts the chosen ones, of an embedding that is not the head as well one row."""
    config = model.config.text
    total = 0
    for name, array in parameters(model).items():
        if ".switch_mlp." in name and config.moe:
            total += array.nbytes * config.moe.num_experts_per_tok // config.moe.num_experts
        elif ".embed_tokens." in name and not config.tie_word_embeddings:
            total += array.nbytes // config.vocab_size
        else:
            total += array.nbytes
    return total


def quantization(model: nn.Module) -> str:
    """The forms in which matrices are packed: "4 bit by 64, affine", several joined, or "none"."""
    forms = {(m.bits, m.group_size, m.mode) for _, m in model.named_modules() if hasattr(m, "group_size")}
    return " and ".join(f"{bits} bit by {size}, {mode}" for bits, size, mode in sorted(forms)) or "none"
