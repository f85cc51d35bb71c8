"""Projections of one input as one matmul: for a decoded token each of them is a launch, and the launches are the time.

Names of weights and their values stay what they are; only where they lie in memory changes.
"""

from copy import copy

import mlx.core as mx
import mlx.nn as nn

WEIGHTS = ("weight", "scales", "biases")


class JointProjection:
    """The projections of these names in a module. Until `fuse` each is a matmul of its own."""

    def __init__(self, *names: str) -> None:
        self.names = names
        self.fused: nn.Module | None = None
        self._splits: list[int] = []

    def __call__(self, module: nn.Module, x: mx.array) -> list[mx.array]:
        """x [B, T, D] -> one [B, T, n] for each name, n its number of outputs."""
        # Of more than one token the parts would not be contiguous, and what reads them would copy them first.
        if self.fused is None or x.size > x.shape[-1]:
            return [module[name](x) for name in self.names]
        return list(mx.split(self.fused(x), self._splits, axis=-1))

    def as_they_lie(self, module: nn.Module, x: mx.array) -> tuple[list[mx.array], list[int]]:
        """x [B, T, D] -> for each name an array that holds its outputs, and the column where they begin in it."""
        if self.fused is None:
            return [module[name](x) for name in self.names], [0] * len(self.names)
        return [self.fused(x)] * len(self.names), [0, *self._splits]

    def fuse(self, module: nn.Module) -> None:
        """Lay the weights one behind the other, where they are of one kind; those of `module` become views of them.

        Lazy: nothing is read or copied before it is used, and no weight is kept twice. A weight of `module` that is
        exchanged afterwards is not seen until `fuse` is called again.
        """
        layers = [module[name] for name in self.names]
        if len({_kind(layer) for layer in layers}) > 1:
            return
        fused = copy(layers[0])
        stops = [sum(layer.weight.shape[0] for layer in layers[: i + 1]) for i in range(len(layers))]
        for name in (name for name in WEIGHTS if layers[0].get(name) is not None):
            whole = mx.concatenate([layer[name] for layer in layers], axis=0)
            setattr(fused, name, whole)
            for layer, start, stop in zip(layers, [0, *stops], stops):
                setattr(layer, name, whole[start:stop])
        self.fused, self._splits = fused, stops[:-1]


def fuse_projections(model: nn.Module) -> None:
    """`fuse` every `JointProjection` of every module of `model`."""
    for module in model.modules():
        for joint in vars(module).values():
            if isinstance(joint, JointProjection):
                joint.fuse(module)


def _kind(layer: nn.Module) -> tuple[object, ...]:
    """What must agree for two layers to be one: their class, dtypes, and how they are quantized."""
    arrays = tuple(layer[name].dtype for name in WEIGHTS if layer.get(name) is not None)
    quantization = tuple(getattr(layer, name, None) for name in ("bits", "group_size", "mode"))
    return type(layer), arrays, quantization
