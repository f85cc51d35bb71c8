"""Projections without bias. A CPU gets the product of one token in a form that keeps its memory busy."""

import mlx.core as mx
import mlx.nn as nn

from qwen_mlx.kernels.backend import gpu_generation

ROWS = 256


def project(x: mx.array, weight: mx.array) -> mx.array:
    """x [B, T, D], weight [N, D] -> x weight^T, [B, T, N].

    On a CPU one token meets the weight as a batch of pieces, which are views of it: OpenBLAS has a kernel for small
    matrices that reads up to twice as many bytes a second as its general one (`benchmarks/prefill_decode.py`).
    """
    rows, size = weight.shape
    if x.size > size or rows % ROWS or gpu_generation() is not None:
        return x @ weight.T
    pieces = weight.reshape(rows // ROWS, ROWS, size).swapaxes(1, 2)
    return (x @ pieces).reshape(*x.shape[:-1], rows)


class Linear(nn.Linear):
    def __init__(self, input_dims: int, output_dims: int) -> None:
        super().__init__(input_dims, output_dims, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return project(x, self.weight)


class Embedding(nn.Embedding):
    def as_linear(self, x: mx.array) -> mx.array:
        """Hidden states [B, T, D] to logits [B, T, V], by the same matrix."""
        return project(x, self.weight)
