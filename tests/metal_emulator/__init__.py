"""Metal kernels on a Linux processor, checked as they run: what mx.fast.metal_kernel makes, without a Mac.

`metal_kernel` takes the place of mx.fast.metal_kernel. The text that MLX would compile is generated, checked as the
Metal compiler would (static_check.py), compiled as C++ against an emulated <metal_stdlib> and run thread by thread,
every memory access watched. README.md says what that can and cannot tell.
"""

from tests.metal_emulator.findings import Finding, MetalCompileError, MetalEmulatorError
from tests.metal_emulator.kernel import MetalKernel, metal_kernel
from tests.metal_emulator.options import Options, using
from tests.metal_emulator.recording import Run, Traffic, recording
from tests.metal_emulator.requirements import require

__all__ = [
    "Finding",
    "MetalCompileError",
    "MetalEmulatorError",
    "MetalKernel",
    "Options",
    "Run",
    "Traffic",
    "metal_kernel",
    "recording",
    "require",
    "using",
]
