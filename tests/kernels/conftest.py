"""Where a kernel test runs: in plain MLX, or on the emulated Metal device, there under several of its freedoms."""

from collections.abc import Iterator

import pytest

from tests.metal_emulator.device import emulated_metal

# What Metal leaves open, and a compiler may choose: contraction of a * b + c, the order in which lanes are added, the
# order in which threads run.
# No notes are allowed: our kernels neither write a place twice nor rely on a SIMD-group running in step.
FREEDOMS = {
    "metal": {"fma": False, "reduce_order": "ascending", "order": "forward"},
    "metal_fma_descending_backwards": {"fma": True, "reduce_order": "descending", "order": "reverse"},
    "metal_sequential_shuffled": {"fma": False, "reduce_order": "sequential", "order": "random", "seed": 1},
}


@pytest.fixture(params=FREEDOMS)
def metal(request: pytest.FixtureRequest) -> Iterator[None]:
    with emulated_metal(allow=(), **FREEDOMS[request.param]):
        yield


@pytest.fixture(params=["plain", *FREEDOMS])
def anywhere(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.param == "plain":
        yield
        return
    with emulated_metal(allow=(), **FREEDOMS[request.param]):
        yield
