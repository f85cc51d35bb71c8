"""The residual stream takes in what a block adds to it, and is normed for the next block: two results in one launch."""

import mlx.core as mx

from qwen_mlx.kernels.backend import Kernel

ADD_RMS_NORM = Kernel("add_rms_norm", ("x", "update", "gain", "eps"), ("total", "normed"))
SIMDGROUPS = 8


def add_rms_norm(x: mx.array, update: mx.array, gain: mx.array, eps: float) -> tuple[mx.array, mx.array]:
    """x + update, and that sum / sqrt(mean of its squares + eps) * gain.

    x, update [..., D] of one dtype; gain [D] float32. The sum is rounded to the dtype of x before the norm reads it;
    the norm is float32 up to one rounding. Returns both [..., D] in the dtype of x.
    Raises ValueError where x and update differ in shape or dtype.
    """
    if (x.shape, x.dtype) != (update.shape, update.dtype):
        raise ValueError(
            f"update is {update.dtype} {update.shape} and x {x.dtype} {x.shape}; both must have one shape and dtype."
        )
    if ADD_RMS_NORM.usable:
        return metal_add_rms_norm(x, update, gain, eps)
    total = x + update
    # With a float32 gain, rms_norm answers in float32.
    return total, mx.fast.rms_norm(total, gain, eps).astype(x.dtype)


def naive_add_rms_norm(x: mx.array, update: mx.array, gain: mx.array, eps: float) -> tuple[mx.array, mx.array]:
    """The formula of `add_rms_norm` for the reader; same arguments and results."""
    total = x + update
    wide = total.astype(mx.float32)
    return total, (wide / mx.sqrt((wide * wide).mean(axis=-1, keepdims=True) + eps) * gain).astype(x.dtype)


def metal_add_rms_norm(x: mx.array, update: mx.array, gain: mx.array, eps: float) -> tuple[mx.array, mx.array]:
    size = x.shape[-1]
    total, normed = ADD_RMS_NORM(
        x,
        update,
        gain,
        eps,
        outputs=[(x.shape, x.dtype)] * 2,
        grid=(SIMDGROUPS, x.size // size),
        simdgroups=SIMDGROUPS,
        X=x.dtype,
        D=size,
        SIMDGROUPS=SIMDGROUPS,
    )
    return total, normed
