"""The engines that the model bench measures, and one timed run of either: prompt tokens to seconds and bytes.

Each generates greedily through its own functions and under its own limits of memory, as a user meets it: the next step
is on its way while a token is counted, and a text's end does not stop it.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn

from qwen_mlx.decoding.autoregressive import decode
from qwen_mlx.decoding.memory import device_limits
from qwen_mlx.decoding.prefill import prefill
from qwen_mlx.decoding.preflight import STEP_SIZES
from qwen_mlx.decoding.sampling import Sampler, SamplingParams
from qwen_mlx.load import parameters
from qwen_mlx.model.qwen import Qwen


class Engine(Protocol):
    name: str
    weight_bytes: int

    def tokens(self, prompt: Sequence[int], count: int) -> Iterator[int]:
        """`count` greedy tokens after `prompt`."""

    def synchronize(self) -> None:
        """Wait for what is still on its way to the device."""


class Ours:
    """This package. `num_real_tokens` of the vocabulary have a text; the others are never drawn."""

    name = "qwen_mlx"

    def __init__(self, model: Qwen, num_real_tokens: int) -> None:
        self.model = model
        self.num_real_tokens = num_real_tokens
        self.weight_bytes = parameter_bytes(model)

    def tokens(self, prompt: Sequence[int], count: int) -> Iterator[int]:
        return (token for token, _ in self.steps(prompt, count))

    def steps(self, prompt: Sequence[int], count: int) -> Iterator[tuple[int, mx.array]]:
        """`count` greedy tokens after `prompt`, each with the logits [V] it was drawn from."""
        vocab_size = self.model.config.text.vocab_size
        sampler = Sampler(SamplingParams(), prompt, vocab_size=vocab_size, num_real_tokens=self.num_real_tokens)
        cache = self.model.make_cache()
        with device_limits():
            logits = prefill(self.model, prompt, cache, step_size=STEP_SIZES[0])
            # mlx-lm begins a step beyond the last token as well.
            decoded = decode(self.model, logits, cache, sampler, count=count + 1)
            yield from ((token, row) for token, row, _ in islice(decoded, count))

    def synchronize(self) -> None:
        mx.synchronize()


def parameter_bytes(model: nn.Module) -> int:
    """Of all parameters together."""
    return sum(array.nbytes for array in parameters(model).values())


@dataclass(frozen=True)
class Run:
    """Raw figures of one generation. `peak_bytes`: as if this engine were alone in the process."""

    prompt_tokens: int
    generated_tokens: int
    first_s: float
    decode_s: float
    peak_bytes: int

    @property
    def prefill_tps(self) -> float:
        return self.prompt_tokens / self.first_s

    @property
    def decode_tps(self) -> float:
        return (self.generated_tokens - 1) / self.decode_s


def timed_run(engine: Engine, prompt: Sequence[int], count: int) -> Run:
    """Generate `count` tokens, at least two, with the device idle before the clock starts."""
    engine.synchronize()
    mx.clear_cache()
    mx.reset_peak_memory()
    held = mx.get_active_memory()
    start = first = last = time.perf_counter()
    for n, _ in enumerate(engine.tokens(prompt, count)):
        last = time.perf_counter()
        if n == 0:
            first = last
    engine.synchronize()
    # Held before the run are the weights of every engine; of these only its own belong to it.
    peak = mx.get_peak_memory() - held + engine.weight_bytes
    return Run(len(prompt), count, first - start, last - first, peak)
