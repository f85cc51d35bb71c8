"""One decoded token through a Gated DeltaNet layer, all between its input projections and its output projection."""

from dataclasses import dataclass

import mlx.core as mx

from qwen_mlx.kernels.activations import sigmoid, silu, softplus
from qwen_mlx.kernels.backend import Kernel
from qwen_mlx.kernels.causal_conv1d import naive_causal_conv1d
from qwen_mlx.kernels.gated_delta import naive_gated_delta_rule
from qwen_mlx.kernels.gated_delta_arguments import ROWS, kernels_fit

STEP = Kernel(
    "gated_delta_step",
    ("qkv", "z", "a", "b", "weight", "conv_state", "A_log", "dt_bias", "gain", "eps", "state"),
    ("y", "conv_out", "state_out"),
)


@dataclass(frozen=True)
class StepWeights:
    """Of one layer: taps [Cn, K]; A_log, dt_bias [Hv] and the norm's gain [Dv] in float32; the norm's eps."""

    taps: mx.array
    A_log: mx.array
    dt_bias: mx.array
    gain: mx.array
    eps: float


def step_is_fused(conv_state: mx.array, state: mx.array) -> bool:
    """Whether `gated_delta_step` has a kernel here for states of these shapes; without one there is no step."""
    return STEP.usable and step_fits(conv_state.shape[1] + 1, _key_heads(conv_state, state), *state.shape[1:])


def step_fits(taps: int, Hk: int, Hv: int, Dv: int, Dk: int) -> bool:
    """Whether the kernel is written for so many taps, key and value heads, and heads of these sizes."""
    return taps >= 2 and kernels_fit(Hk, Hv, Dv, Dk)


def gated_delta_step(
    projected: tuple[mx.array, mx.array, mx.array, mx.array],
    weights: StepWeights,
    conv_state: mx.array,
    state: mx.array,
    starts: tuple[int, int] = (0, 0),
) -> tuple[mx.array, mx.array, mx.array]:
    """The convolution, the gates, the delta rule and the gated norm of one token, in one launch.

    `projected`: qkv [B, 1, Cn], z [B, 1, Hv Dv], a and b [B, 1, Hv]; conv_state [B, K-1, Cn];
    state [B, Hv, Dv, Dk] float32. Each of the four may be the head of longer rows; z and b may also begin at a later
    column, `starts`, so that what one matmul projected is read as it lies.
    Formulas: `causal_conv1d`, `gated_delta_rule`, `naive_gated_delta_step`.

    Returns y [B, 1, Hv Dv], in qkv's dtype, and both states. Ask `step_is_fused` first.
    """
    qkv, z, a, b = projected
    B, Hv, Dv, Dk = state.shape
    y, conv_state, state = STEP(
        qkv,
        z,
        a,
        b,
        weights.taps,
        conv_state,
        weights.A_log,
        weights.dt_bias,
        weights.gain,
        weights.eps,
        state,
        outputs=[((B, 1, Hv * Dv), qkv.dtype), (conv_state.shape, qkv.dtype), (state.shape, mx.float32)],
        grid=(min(Dv // ROWS, 8), B * Hv),
        simdgroups=8,
        X=qkv.dtype,
        Dk=Dk,
        Dv=Dv,
        K=weights.taps.shape[1],
        ZStart=starts[0],
        BStart=starts[1],
    )
    return y, conv_state, state


def naive_gated_delta_step(
    projected: tuple[mx.array, mx.array, mx.array, mx.array],
    weights: StepWeights,
    conv_state: mx.array,
    state: mx.array,
    starts: tuple[int, int] = (0, 0),
) -> tuple[mx.array, mx.array, mx.array]:
    """The formulas of `gated_delta_step`, one behind the other, for the reader; same arguments and results."""
    B, Hv, Dv, Dk = state.shape
    firsts, sizes = (0, starts[0], 0, starts[1]), (conv_state.shape[-1], Hv * Dv, Hv, Hv)
    qkv, z, a, b = (x[..., first : first + size] for x, first, size in zip(projected, firsts, sizes))
    q, k, v, conv_state = naive_causal_conv1d(
        qkv, weights.taps, conv_state, key_heads=_key_heads(conv_state, state), key_dim=Dk
    )
    g = -mx.exp(weights.A_log) * softplus(a.astype(mx.float32) + weights.dt_bias)
    o, state = naive_gated_delta_rule(q, k, v.reshape(B, 1, Hv, Dv), g, sigmoid(b), state)
    normed = o / mx.sqrt((o * o).mean(axis=-1, keepdims=True) + weights.eps) * weights.gain
    return (normed.reshape(z.shape) * silu(z)).astype(qkv.dtype), conv_state, state


def _key_heads(conv_state: mx.array, state: mx.array) -> int:
    _, Hv, Dv, Dk = state.shape
    return (conv_state.shape[-1] - Hv * Dv) // (2 * Dk)
