"""The state behind the first tokens of a tape: how a cache takes back what was read too far."""

import mlx.core as mx

from qwen_mlx.kernels.gated_delta_arguments import ROWS
from qwen_mlx.kernels.gated_delta_scan import REPLAY, Tape, tape_is_fused


def gated_delta_replay(state: mx.array, tape: Tape, n: int) -> mx.array:
    """The state after n tokens, bit for bit that of a scan which stopped there:

        S = exp(g_t) S + d_t k_t^T,   t < n

    state [B, Hv, Dv, Dk] float32, as it was before the first token of `tape`; n from 0 to T.
    Raises ValueError for any other n, and for a state that is not of the tape's heads.
    """
    B, T, Hk, Dk = tape.k.shape
    if not 0 <= n <= T:
        raise ValueError(f"n is {n}; the tape holds {T} tokens, so it must be 0 to {T}.")
    if state.shape != (shape := (B, *tape.delta.shape[2:], Dk)):
        raise ValueError(f"state has shape {state.shape}; beside this tape it must be {shape}.")
    if n == 0:
        return state
    if tape_is_fused(state, Hk):
        return metal_gated_delta_replay(state, tape, n)
    return naive_gated_delta_replay(state, tape, n)


def naive_gated_delta_replay(state: mx.array, tape: Tape, n: int) -> mx.array:
    """The formula of `gated_delta_replay` for the reader, and with no sum in it also the plain form."""
    B, _, Hk, Dk = tape.k.shape
    Hv, Dv = tape.delta.shape[2:]
    state = state.reshape(B, Hk, -1, Dv, Dk)
    for t in range(n):
        alpha = mx.exp(tape.g[:, t]).reshape(B, Hk, -1, 1, 1)
        delta = tape.delta[:, t].reshape(B, Hk, -1, Dv, 1)
        state = alpha * state + delta * tape.k[:, t].astype(mx.float32).reshape(B, Hk, 1, 1, Dk)
    return state.reshape(B, Hv, Dv, Dk)


def metal_gated_delta_replay(state: mx.array, tape: Tape, n: int) -> mx.array:
    B, Hv, Dv, Dk = state.shape
    (after,) = REPLAY(
        state,
        tape.k,
        tape.g,
        tape.delta,
        mx.array(n, mx.int32),
        outputs=[(state.shape, mx.float32)],
        grid=(Dv // ROWS, B * Hv),
        simdgroups=4,
        Key=tape.k.dtype,
        Dk=Dk,
    )
    return after
