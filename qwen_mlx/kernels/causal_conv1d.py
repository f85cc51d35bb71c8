"""The depthwise causal convolution with SiLU: projected channels in; queries, keys, values and the last columns out.

Which cache keeps the columns is not known here.
"""

import mlx.core as mx

from qwen_mlx.kernels.activations import silu
from qwen_mlx.kernels.backend import Kernel
from qwen_mlx.kernels.gated_delta_arguments import KEY_SIZES

L2_EPS = 1e-6
BLOCK_TOKENS = 8
"""Tokens that one SIMD-group takes with one window in its registers."""
CONV = Kernel("causal_conv1d", ("x", "weight", "conv_state", "ends"), ("q", "k", "v", "conv_out"))


def causal_conv1d(
    x: mx.array,
    weight: mx.array,
    conv_state: mx.array,
    *,
    key_heads: int,
    key_dim: int,
    mask: mx.array | None = None,
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """Convolve every channel over its current and K-1 previous tokens, then SiLU; normalize what are queries and keys.

        y_t = silu(sum_i w_i x_{t-K+1+i}),   i = 0..K-1: tap K-1 weighs the current token
        q = y / |y| / sqrt(Dk);   k = y / |y|;   v = y        with |y|^2 = sum over a head + 1e-6

    x [B, T, Cn]: Hk heads of Dk channels of queries, as many of keys, then values (`key_heads`, `key_dim` are Hk, Dk);
    weight [Cn, K]; conv_state [B, K-1, Cn]: the columns of x before this call, zeros at the start;
    mask [B, T] bool: False tokens count as zeros, and those after a row's last True token do not enter its state, so
    that rows may be padded on either side.

    Returns q, k [B, T, Hk, Dk] and v [B, T, Cn - 2 Hk Dk] in float32, and the new conv_state in x's dtype: nothing is
    rounded on the way to the delta rule. Raises ValueError for a shape or dtype other than these.
    """
    _check(x, weight, conv_state, 2 * key_heads * key_dim, mask)
    if mask is not None:
        x = mx.where(mask[..., None], x, 0)
    if CONV.usable and conv_fits(weight.shape[1], key_dim):
        q, k, v, columns = metal_causal_conv1d(x, weight, conv_state, key_heads, key_dim, mask)
        return q, k, v, columns
    return _shifted_products(x, weight, conv_state, key_heads, key_dim, mask)


def conv_fits(taps: int, key_dim: int) -> bool:
    """Whether the kernel is written for so many taps and heads of this size."""
    return taps >= 2 and key_dim in KEY_SIZES


def naive_causal_conv1d(
    x: mx.array,
    weight: mx.array,
    conv_state: mx.array,
    *,
    key_heads: int,
    key_dim: int,
    mask: mx.array | None = None,
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """The formula of `causal_conv1d`, row by row and token by token, for the reader; same arguments and results."""
    B, T, _ = x.shape
    rows, states = [], []
    for b in range(B):
        window, state = conv_state[b].astype(x.dtype), conv_state[b].astype(x.dtype)  # [K-1, Cn]
        outputs = []
        for t in range(T):
            real = mask is None or bool(mask[b, t])
            window = mx.concatenate([window, x[b, t : t + 1] if real else mx.zeros_like(x[b, t : t + 1])])
            z = (window.astype(mx.float32) * weight.astype(mx.float32).T).sum(axis=0)
            outputs.append(z * mx.sigmoid(z))
            window = window[1:]
            state = window if real else state
        rows.append(mx.stack(outputs))
        states.append(state)
    q, k, v = mx.split(mx.stack(rows), [key_heads * key_dim, 2 * key_heads * key_dim], axis=-1)
    q, k = (y.reshape(B, T, key_heads, key_dim) for y in (q, k))
    q, k = (y / mx.sqrt((y * y).sum(axis=-1, keepdims=True) + L2_EPS) for y in (q, k))
    return q * key_dim**-0.5, k, v, mx.stack(states)


def _shifted_products(
    x: mx.array, weight: mx.array, conv_state: mx.array, key_heads: int, key_dim: int, mask: mx.array | None
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """The plain form. K shifted products, measured on a CPU, take a fifth of the time of mx.conv1d with its groups."""
    B, T, _ = x.shape
    taps, keys = weight.shape[1], key_heads * key_dim
    columns = mx.concatenate([conv_state.astype(x.dtype), x], axis=1)  # [B, K-1+T, Cn]
    last = _last_columns(columns, taps - 1, mask)
    # First of all: what waits for the end of the graph would keep the columns of every layer until then.
    (columns,) = mx.depends([columns], [last])
    wide, rows = columns.astype(mx.float32), mx.contiguous(weight.astype(mx.float32).T)
    y = wide[:, :T] * rows[:1]
    for i in range(1, taps):
        y = y + wide[:, i : i + T] * rows[i : i + 1]
    q, k, v = mx.split(silu(y), [keys, 2 * keys], axis=-1)
    q, k = (l2_norm(y.reshape(B, T, key_heads, key_dim)) for y in (q, k))
    return q * key_dim**-0.5, k, v, last


def metal_causal_conv1d(
    x: mx.array, weight: mx.array, conv_state: mx.array, key_heads: int, key_dim: int, mask: mx.array | None
) -> list[mx.array]:
    """q, k, v and the new conv_state; masked tokens of x are zeros already."""
    B, T, Cn = x.shape
    keys = (B, T, key_heads, key_dim)
    return CONV(
        x,
        weight,
        conv_state,
        mx.array([T] * B, mx.int32) if mask is None else _ends(mask),
        outputs=[
            (keys, mx.float32),
            (keys, mx.float32),
            ((B, T, Cn - 2 * key_heads * key_dim), mx.float32),
            (conv_state.shape, x.dtype),
        ],
        grid=(-(-Cn // key_dim), B * -(-T // BLOCK_TOKENS)),
        simdgroups=4,
        X=x.dtype,
        Hk=key_heads,
        Dk=key_dim,
        K=weight.shape[1],
        TOKENS=BLOCK_TOKENS,
    )


def l2_norm(x: mx.array) -> mx.array:
    """x / sqrt(sum(x^2) + 1e-6) over the last axis, in float32."""
    size = x.shape[-1]
    return mx.fast.rms_norm(x.astype(mx.float32), None, L2_EPS / size) * size**-0.5


def _ends(mask: mx.array) -> mx.array:
    """Tokens up to each row's last real one, [B] int32."""
    return mx.max(mask * mx.arange(1, mask.shape[1] + 1), axis=1).astype(mx.int32)


def _last_columns(columns: mx.array, count: int, mask: mx.array | None) -> mx.array:
    """The `count` columns that end at each row's last real token; columns [B, count+T, Cn]."""
    if mask is None:
        # A copy where a view would keep all columns of a long prompt alive.
        return mx.contiguous(columns[:, columns.shape[1] - count :])
    index = _ends(mask)[:, None, None] + mx.arange(count)[:, None]  # [B, count, 1]
    return mx.take_along_axis(columns, index, axis=1)


def _check(x: mx.array, weight: mx.array, conv_state: mx.array, keyed: int, mask: mx.array | None) -> None:
    for name, array, letters in ("x", x, "[B, T, Cn]"), ("weight", weight, "[Cn, K]"):
        if array.ndim != len(letters.split(",")):
            raise ValueError(f"{name} has shape {array.shape}; it must be {letters}.")
    B, T, Cn = x.shape
    taps = weight.shape[1]
    if T == 0:
        raise ValueError(f"x has shape {x.shape}: no token to process; pass at least one.")
    if Cn <= keyed:
        raise ValueError(f"x has shape {x.shape}; queries and keys alone take {keyed} channels, so it needs more.")
    if weight.shape[0] != Cn:
        raise ValueError(f"weight has shape {weight.shape}; beside x {x.shape} it must be ({Cn}, K).")
    if conv_state.shape != (B, taps - 1, Cn):
        raise ValueError(
            f"conv_state has shape {conv_state.shape}; beside x {x.shape} and weight {weight.shape} "
            f"it must be {(B, taps - 1, Cn)}."
        )
    if mask is not None and mask.shape != (B, T):
        raise ValueError(f"mask has shape {mask.shape}; beside x {x.shape} it must be {(B, T)}.")
    if mask is not None and mask.dtype != mx.bool_:
        raise ValueError(f"mask has dtype {mask.dtype}; it must be bool.")
