"""Metal or plain MLX: decided here once, from the machine this runs on."""

from functools import cache

import mlx.core as mx


@cache
def gpu_generation() -> int | None:
    """The generation of the Apple GPU (13 is M1, 14 M2, 15 M3, 16 M4), None where there is no Metal."""
    if not mx.metal.is_available() or mx.default_device() != mx.Device(mx.gpu):
        return None
    name = str(mx.device_info()["architecture"])  # such as "applegpu_g13g"
    return int("".join(c for c in name.removeprefix("applegpu_g") if c.isdigit()))
