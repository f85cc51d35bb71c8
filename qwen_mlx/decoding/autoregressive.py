"""One token after another: the plain loop."""

from collections.abc import Generator

import mlx.core as mx

from qwen_mlx.cache.sequence import SequenceCache
from qwen_mlx.decoding.sampling import Sampler
from qwen_mlx.model.qwen import Qwen


def decode(
    model: Qwen, logits: mx.array, cache: SequenceCache, sampler: Sampler, *, count: int
) -> Generator[tuple[int, mx.array, bool], None, None]:
    """Yield `count` tokens, each with the logits [V] it was drawn from, and False, as none is a draft; `logits` [1, V]
    are those of the first.

    The next step is on its way to the device while the caller deals with this token.
    """
    token = sampler(logits)
    mx.async_eval(token)
    for remaining in range(count - 1, -1, -1):
        current, row = token, logits[0]
        if remaining:
            logits, _ = model.step(current[:, None], cache)
            token = sampler(logits)
            mx.async_eval(token)
        if remaining % 256 == 0:
            # Outgrown slabs of keys and values, each larger than the last, stay with the allocator otherwise.
            mx.clear_cache()
        yield int(current.item()), row, False  # type: ignore[arg-type]
