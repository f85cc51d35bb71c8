"""A machine that seems to have Metal: the package's kernels run on the emulator, launched by the package's own code."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import pytest

from qwen_mlx.kernels import backend
from tests import metal_emulator


@contextmanager
def emulated_metal(**options: Any) -> Iterator[None]:
    """`options` are those of `using`. Without a compiler the test is skipped, or fails where CI is set."""
    metal_emulator.require()
    with pytest.MonkeyPatch.context() as patch, metal_emulator.using(**options):
        patch.setattr(mx.fast, "metal_kernel", metal_emulator.metal_kernel)
        # For the kernels alone. What else loading and decoding do on Metal stays off: the emulator could not follow a
        # compiled step, say, as it runs a kernel when it is called.
        patch.setattr(backend, "gpu_generation", lambda: 13)
        backend._build.cache_clear()
        yield
    backend._build.cache_clear()
    backend.distrusted.clear()
