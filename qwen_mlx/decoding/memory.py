"""The device's memory while a text is made: weights stay wired, and what is freed is not hoarded."""

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx

from qwen_mlx.kernels.backend import gpu_generation

CACHED_BYTES = 1 << 30
"""Of freed buffers, most that MLX keeps for the next allocation: more than a chunk of a prompt leaves behind."""


@contextmanager
def device_limits() -> Iterator[None]:
    """On Metal, wire as much as the device recommends, so that weights are not paged between tokens; restored after.

    `max_recommended_working_set_size` is what Metal says, and MLX's documentation asks for.
    """
    if gpu_generation() is None:
        yield
        return
    wired = mx.set_wired_limit(int(mx.device_info()["max_recommended_working_set_size"]))
    cached = mx.set_cache_limit(CACHED_BYTES)
    try:
        yield
    finally:
        mx.synchronize()  # what is still under way relies on the wired memory
        mx.set_wired_limit(wired)
        mx.set_cache_limit(cached)
