"""What all forms of the gated delta rule ask of their arguments, and which of them the Metal kernels can take."""

import mlx.core as mx

KEY_SIZES = (32, 64, 96, 128)
ROWS = 8
"""Rows of the state that a SIMD-group holds."""
GROUP = 4
"""Most value heads of one key head: what released models have at most, and so what the kernels are tested with."""


def check_arguments(
    q: mx.array, k: mx.array, v: mx.array, g: mx.array, beta: mx.array, state: mx.array, mask: mx.array | None
) -> None:
    """Raises ValueError for shapes and dtypes other than those of `gated_delta_rule`."""
    for name, x, letters in ("q", q, "[B, T, Hk, Dk]"), ("v", v, "[B, T, Hv, Dv]"):
        if x.ndim != 4:
            raise ValueError(f"{name} has shape {x.shape}; it must be {letters}.")
    B, T, Hk, Dk = q.shape
    Hv, Dv = v.shape[2:]
    expected: list[tuple[str, mx.array, tuple[int, ...]]] = [
        ("k", k, (B, T, Hk, Dk)),
        ("v", v, (B, T, Hv, Dv)),
        ("g", g, (B, T, Hv)),
        ("beta", beta, (B, T, Hv)),
        ("state", state, (B, Hv, Dv, Dk)),
    ]
    if mask is not None:
        expected.append(("mask", mask, (B, T)))
    for name, x, shape in expected:
        if x.shape != shape:
            raise ValueError(f"{name} has shape {x.shape}; beside q {q.shape} and v {v.shape} it must be {shape}.")
    if T == 0:
        raise ValueError(f"q has shape {q.shape}: no token to process; pass at least one.")
    if Hv % Hk:
        raise ValueError(f"v {v.shape} has {Hv} heads, which is no multiple of the {Hk} heads of q {q.shape}.")
    if k.dtype != q.dtype:
        raise ValueError(f"k has dtype {k.dtype}; it must be that of q, {q.dtype}.")
    for name, x in ("g", g), ("state", state):  # 16 bits turn a decay of 0.999 into 1
        if x.dtype != mx.float32:
            raise ValueError(f"{name} has dtype {x.dtype}; it must be float32.")
    if mask is not None and mask.dtype != mx.bool_:
        raise ValueError(f"mask has dtype {mask.dtype}; it must be bool.")


def freeze_masked(g: mx.array, beta: mx.array, mask: mx.array | None) -> tuple[mx.array, mx.array]:
    """g and beta with neither decay nor write where `mask` is False: exactly the state before."""
    if mask is None:
        return g, beta
    return mx.where(mask[..., None], g, 0), mx.where(mask[..., None], beta, 0)


def kernels_fit(Hk: int, Hv: int, Dv: int, Dk: int) -> bool:
    """Whether the Metal kernels are written for so many key and value heads of these sizes."""
    return Dk in KEY_SIZES and Dv % ROWS == 0 and Hv % Hk == 0 and Hv // Hk <= GROUP
