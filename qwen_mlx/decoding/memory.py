"""The device's memory: how much there is; while a text is made, weights stay wired and what is freed is not hoarded."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import mlx.core as mx

from qwen_mlx.kernels.backend import gpu_generation

CACHED_BYTES = 1 << 30
"""Of freed buffers, most that MLX keeps for the next allocation: more than a chunk of a prompt leaves behind."""

MEMINFO = Path("/proc/meminfo")  # of Linux


def memory_limit() -> int | None:
    """Bytes that MLX may hold in all: on Metal what the device recommends, on Linux what is available and what MLX
    holds already; None where neither can be read."""
    if gpu_generation() is not None:
        return int(mx.device_info()["max_recommended_working_set_size"])
    try:
        lines = MEMINFO.read_text().splitlines()
    except OSError:
        return None
    available = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), None)
    return None if available is None else int(available) * 1024 + mx.get_active_memory() + mx.get_cache_memory()


@dataclass
class _Device:
    """The texts that are being made, and the limits that were there before the first of them."""

    users: int = 0
    wired: int = 0
    cached: int = 0


_device, _lock = _Device(), Lock()


@contextmanager
def device_limits() -> Iterator[None]:
    """On Metal, wire as much as the device recommends, so that weights are not paged between tokens.

    `max_recommended_working_set_size` is what Metal says, and MLX's documentation asks for. Texts may be made side by
    side and end in any order: the first sets the limits, and the last restores them.
    """
    if gpu_generation() is None:
        yield
        return
    with _lock:
        if _device.users == 0:
            _device.wired = mx.set_wired_limit(int(mx.device_info()["max_recommended_working_set_size"]))
            _device.cached = mx.set_cache_limit(CACHED_BYTES)
        _device.users += 1
    try:
        yield
    finally:
        mx.synchronize()  # what is still under way relies on the wired memory
        with _lock:
            _device.users -= 1
            if _device.users == 0:
                mx.set_wired_limit(_device.wired)
                mx.set_cache_limit(_device.cached)
