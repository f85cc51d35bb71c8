"""Metal or plain MLX: decided here once, from the machine this runs on."""

import re
from functools import cache

import mlx.core as mx


@cache
def gpu_generation() -> int | None:
    """The generation of the Apple GPU (13 is M1, 14 M2, 15 M3, 16 M4), None where there is no Metal."""
    if not mx.metal.is_available() or mx.default_device() != mx.Device(mx.gpu):
        return None
    return read_generation(str(mx.device_info()["architecture"]))


def read_generation(architecture: str) -> int:
    """The number in names such as "applegpu_g13g"; a GPU that does not say (a virtual one) counts as the first."""
    number = re.match(r"applegpu_g(\d+)", architecture)
    return int(number[1]) if number else 13
