"""Prompt tokens into the cache, in chunks that bound the memory, and the logits of the token that follows."""

from collections.abc import Callable, Sequence

import mlx.core as mx

from qwen_mlx.cache.sequence import SequenceCache
from qwen_mlx.errors import CheckpointError
from qwen_mlx.load import weights_with_nan
from qwen_mlx.model.qwen import Qwen


def prefill(
    model: Qwen,
    tokens: Sequence[int],
    cache: SequenceCache,
    *,
    step_size: int,
    marks: Sequence[int] = (),
    seen: Callable[[mx.array, mx.array], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> mx.array:
    """Logits [1, V] after `tokens`; the output matrix meets the last position only.

    `progress(done, total)` is called at the start and after every chunk of at most `step_size` tokens. Interrupted,
    the cache holds the chunks that were finished. At the offsets `marks` it gets checkpoints, for which no chunk is
    divided. `seen(hidden, tokens)` gets the hidden states [1, T, D] of every chunk and the tokens behind each of them,
    the last of all lacking. ValueError for a `step_size` below 1, CheckpointError for logits that are no numbers.
    """
    if step_size < 1:
        raise ValueError(f"The prefill step_size must be at least 1 token, not {step_size!r}.")
    if progress:
        progress(0, len(tokens))
    for start in range(0, len(tokens), step_size):
        chunk = mx.array([list(tokens[start : start + step_size])])
        hidden = model.hidden(model.embed(chunk), cache, marks=marks)
        if seen:
            seen(hidden, mx.array(list(tokens[start + 1 : start + 1 + chunk.size]), mx.uint32))
        mx.eval(hidden, cache.arrays, cache.remembered)
        mx.clear_cache()
        if progress:
            progress(start + chunk.size, len(tokens))
    logits = model.logits(hidden[:, -1:])[:, 0]
    if not mx.isfinite(logits).all().item():
        broken = ", ".join(weights_with_nan(model)[:4]) or "the activations overflow; try dtype bfloat16 or float32"
        raise CheckpointError(f"The model's logits are not numbers: {broken}.")
    return logits
