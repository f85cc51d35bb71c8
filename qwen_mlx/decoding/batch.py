"""Several texts at once: a step of the model takes one token of each, and weights are read once for all of them.

In: prompts as token ids, and a sampler for each. Out: their tokens, in the order of time. A text leaves as soon as the
caller says so, and the next prompt takes its place. Knows no text.
"""

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import mlx.core as mx

from qwen_mlx.cache.rows import chosen, joined
from qwen_mlx.cache.sequence import SequenceCache
from qwen_mlx.decoding.prefill import prefill
from qwen_mlx.decoding.sampling import Sampler
from qwen_mlx.model.qwen import Qwen


@dataclass
class _Row:
    """A text that is being written: its number, and a token [1] that is chosen and has not gone in."""

    number: int
    sampler: Sampler
    token: mx.array


def decode_batch(
    model: Qwen,
    texts: Iterable[tuple[Sequence[int], Sampler]],
    *,
    size: int,
    step_size: int,
) -> Generator[tuple[int, int], bool, None]:
    """Yield (number of the prompt, token) for at most `size` texts at a time; send back whether the text goes on.

    Each text is a prompt and what draws its tokens, taken when it is its turn; prompts are read one by one, in chunks
    of `step_size`. Errors are those of `prefill`, and ValueError for a `size` below 1.
    """
    if size < 1:
        raise ValueError(f"The size of a batch must be at least 1, not {size!r}.")
    waiting = enumerate(texts)
    rows: list[_Row] = []
    cache: SequenceCache | None = None
    while True:
        new = list[SequenceCache]()
        for number, (prompt, sampler) in islice(waiting, size - len(rows)):
            new.append(model.make_cache())
            token = sampler(prefill(model, prompt, new[-1], step_size=step_size))
            mx.async_eval(token)
            rows.append(_Row(number, sampler, token))
        if not rows:
            return
        if new:
            cache = joined([*([cache] if cache else []), *new], model.turn)
            new.clear()  # else they would be there twice while they are joined
        assert cache is not None
        logits, _ = model.step(mx.concatenate([row.token for row in rows])[:, None], cache)
        current = [row.token for row in rows]
        for row, own_logits in zip(rows, mx.split(logits, len(rows))):
            row.token = row.sampler(own_logits)
        mx.async_eval([row.token for row in rows])
        on = []
        for i, row in enumerate(rows):
            if (yield row.number, int(current[i].item())):  # type: ignore[arg-type]
                on.append(i)
        if len(on) < len(rows):
            cache, rows = chosen(cache, on, model.turn) if on else None, [rows[i] for i in on]
