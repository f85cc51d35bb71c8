"""Models by their measures, a layer at a time: what is measured may be larger than the memory.

In: models whose weights are lazy, as `load_model` gives them, and windows of tokens. Out: perplexity, or a
`Comparison`. A measured model is consumed: its layers are dropped as the text passes through them.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import mlx.core as mx
import numpy as np

from qwen_mlx.errors import CheckpointError
from qwen_mlx.evaluation.measures import (
    Comparison,
    Scores,
    compare_logits,
    likelihood,
    log_probabilities,
    summarize,
)
from qwen_mlx.model.qwen import Qwen
from qwen_mlx.model.span import make_span

BLOCK = 64  # positions whose logits are there at once: 64 MB of float32 at 248,320 tokens
Head = Callable[[mx.array], mx.array]  # hidden [P, D] -> logits [P, V]
Progress = Callable[[int, int], None]  # tokens done, tokens in all


def hidden_states(model: Qwen, windows: Sequence[mx.array], progress: Progress | None = None) -> list[mx.array]:
    """Windows [T], each from an empty state -> hidden states after the final norm, [T, D] each. Consumes `model`.

    All windows pass a layer before the next one is read, and a layer is dropped behind them: memory holds one layer
    and the states, and the embedding where it serves as the head. Afterwards only `model.logits` works.

    Raises ValueError for a model that was consumed before.
    """
    text, decoder = model.config.text, model.model
    if len(decoder.layers) != text.num_hidden_layers:
        raise ValueError("This model was consumed by an earlier measurement; load it again.")
    tokens = sum(window.size for window in windows)
    if progress:
        progress(0, tokens)
    states: list[tuple[mx.array, mx.array | None]] = [(model.embed(window[None]), None) for window in windows]
    mx.eval(states)
    if not text.tie_word_embeddings:
        del decoder.embed_tokens
    for n in range(text.num_hidden_layers):
        layer = decoder.layers.pop(0)
        for i, (x, update) in enumerate(states):
            states[i] = layer(x, update, model.make_cache().layers[n], make_span(x.shape[1], 0))
            mx.eval(states[i])
        del layer
        mx.clear_cache()
        if progress:
            progress(tokens * (n + 1) // text.num_hidden_layers, tokens)
    hidden = [decoder.norm.of_sum(x, update)[1][0] for x, update in states]
    mx.eval(hidden)
    return hidden


def perplexity(model: Qwen, windows: Sequence[mx.array], *, vocab_size: int, progress: Progress | None = None) -> float:
    """exp of the mean negative log likelihood of every token but a window's first. Consumes `model`.

    `vocab_size` counts the tokens there are; rows of the vocabulary behind them are left out.
    Raises CheckpointError for logits that are not numbers.
    """
    hidden = hidden_states(model, windows, progress)
    parts = [
        np.array(likelihood(log_probabilities(model.logits(hidden[i][block]), vocab_size), targets))
        for i, block, targets in _blocks(windows)
    ]
    return math.exp(_finite(float(np.concatenate(parts).astype(np.float64).mean())))


def compare(
    reference: Qwen, model: Qwen, windows: Sequence[mx.array], *, vocab_size: int, progress: Progress | None = None
) -> Comparison:
    """How far `model` is from `reference` on `windows`; the one passes them after the other. Consumes both.

    `vocab_size` and errors as in `perplexity`.
    """
    total = 2 * sum(window.size for window in windows)
    first = (lambda done, _: progress(done, total)) if progress else None
    second = (lambda done, _: progress(total // 2 + done, total)) if progress else None
    expected, found = hidden_states(reference, windows, first), hidden_states(model, windows, second)
    return compare_states(reference.logits, expected, model.logits, found, windows, vocab_size=vocab_size)


def compare_states(
    reference_head: Head,
    expected: Sequence[mx.array],
    head: Head,
    found: Sequence[mx.array],
    windows: Sequence[mx.array],
    *,
    vocab_size: int,
) -> Comparison:
    """`compare` on hidden states [T, D] that are there already, each with the head that reads it."""
    blocks: list[Scores] = []
    for i, block, targets in _blocks(windows):
        blocks.append(compare_logits(reference_head(expected[i][block]), head(found[i][block]), targets, vocab_size))
        mx.eval(blocks[-1])
    comparison = summarize(blocks)
    _finite(comparison.kl_mean)
    return comparison


def _blocks(windows: Sequence[mx.array]) -> Iterator[tuple[int, slice, mx.array]]:
    """The positions that predict, a block at a time: number of the window, its positions, the tokens behind them."""
    for i, window in enumerate(windows):
        for start in range(0, window.size - 1, BLOCK):
            stop = min(start + BLOCK, window.size - 1)
            yield i, slice(start, stop), window[start + 1 : stop + 1]


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise CheckpointError("The model's logits are not numbers: its weights hold NaN or infinity; convert it again.")
    return value
