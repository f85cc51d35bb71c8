"""One token after another: the plain loop."""

from collections.abc import Iterator

import mlx.core as mx

from qwen_mlx.cache.sequence import SequenceCache
from qwen_mlx.decoding.sampling import Sampler
from qwen_mlx.model.qwen import Qwen


def decode(
    model: Qwen, logits: mx.array, cache: SequenceCache, sampler: Sampler, *, count: int
) -> Iterator[tuple[int, mx.array]]:
    """Yield `count` tokens, each with the logits [V] it was drawn from; `logits` [1, V] are those of the first.

    The next step is on its way to the device while the caller deals with this token.
    """
    token = sampler(logits)
    mx.async_eval(token)
    for remaining in range(count - 1, -1, -1):
        current, row = token, logits[0]
        if remaining:
            logits = model.step(current[:, None], cache)
            token = sampler(logits)
            mx.async_eval(token)
        if remaining % 256 == 0:
            # Outgrown slabs of keys and values, each larger than the last, stay with the allocator otherwise.
            mx.clear_cache()
        yield int(current.item()), row  # type: ignore[arg-type]
