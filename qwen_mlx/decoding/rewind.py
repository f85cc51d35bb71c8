"""Any number of tokens back: by the cache itself where it can, else by computing anew from its nearest checkpoint."""

from collections.abc import Sequence

from qwen_mlx.cache.recurrent import RecurrentCache
from qwen_mlx.cache.sequence import SequenceCache
from qwen_mlx.decoding.prefill import prefill
from qwen_mlx.model.qwen import Qwen


def rewind(model: Qwen, cache: SequenceCache, tokens: Sequence[int], n: int, *, step_size: int) -> None:
    """Take back the last n of `tokens`, which are all ids that `cache` holds, in order.

    As exact as `SequenceCache.rewind` where that serves. Elsewhere the cache goes back to its last checkpoint at or
    before the place, or becomes empty, and the tokens up to the place go through `model` again, in chunks of at most
    `step_size`: the same text, but sums in another order, so logits agree to a few units of their last digits.

    Raises ValueError for n below 0 or above `cache.offset`, for `tokens` of another length than that, for a
    `step_size` below 1, and where it would have to compute several rows; the cache is then as it was. Interrupted, it
    holds the chunks that were done.
    """
    if step_size < 1:
        raise ValueError(f"The prefill step_size must be at least 1 token, not {step_size!r}.")
    cache.check_tokens(tokens)
    if cache.can_rewind(n):
        cache.rewind(n)
        return
    rows = next(a.shape[0] for layer in cache.layers if isinstance(layer, RecurrentCache) for a in layer.arrays)
    if rows > 1 or cache.left_padding is not None:
        raise ValueError(
            f"Cannot take back {n} tokens of a batch: only those of its last update can be, as no prompt of several or "
            "padded rows can be computed anew here. Restore a snapshot."
        )
    place = cache.offset - n
    cache.back_to_checkpoint(place)
    if cache.offset < place:
        prefill(model, tokens[cache.offset : place], cache, step_size=step_size)
