"""The gated delta rule: queries, keys, values, log decays and write strengths in; outputs and the advanced state out.

Queries and keys come normalized and scaled, decays and strengths after their activations. This module knows nothing of
projections, convolutions, gates behind the output, or caches; it picks the form that serves.
"""

import mlx.core as mx

from qwen_mlx.kernels.gated_delta_arguments import check_arguments, freeze_masked, kernels_fit
from qwen_mlx.kernels.gated_delta_chunk import CHUNK, chunk_gated_delta_rule, metal_gated_delta_chunk
from qwen_mlx.kernels.gated_delta_scan import (
    SCAN,
    metal_gated_delta_scan,
    naive_gated_delta_scan,
    recurrent_gated_delta_scan,
)

# Most tokens that the scan kernel takes before the chunked one: those of one chunk, by the arithmetic in their texts,
# as nobody has timed either. `python -m qwen_mlx.bench kernels` does, on a Mac. Of 2 to so many tokens a layer keeps a
# tape, and therefore takes the scan everywhere: on a CPU it is level with one chunk, measured at 2, 4, 8 and 16.
SCAN_TOKENS = 16


def gated_delta_rule(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    g: mx.array,
    beta: mx.array,
    state: mx.array,
    *,
    mask: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """Advance the state S of every value head over T tokens and read it with the query after each.

        S = exp(g_t) S;   S = S + beta_t (v_t - S k_t) k_t^T;   o_t = S q_t          (arXiv:2412.06464, eq. 10)

    q, k [B, T, Hk, Dk] of one dtype; v [B, T, Hv, Dv]; g [B, T, Hv] log decay, float32, <= 0, -inf erases the state;
    beta [B, T, Hv] in 0..1; state [B, Hv, Dv, Dk] float32; mask [B, T] bool: False leaves the state as it is, and the
    output of that token means nothing. Value head j reads key head floor(j Hk / Hv). All arithmetic is float32.

    Returns o [B, T, Hv, Dv] in float32, because the norm behind it wants every bit, and the new state.
    Raises ValueError for a shape or dtype other than these, and for T = 0.
    """
    check_arguments(q, k, v, g, beta, state, mask)
    g, beta = freeze_masked(g, beta, mask)
    T, fits = q.shape[1], kernels_fit(q.shape[2], *state.shape[1:])
    if fits and CHUNK.usable and T > SCAN_TOKENS:
        o, state = metal_gated_delta_chunk(q, k, v, g, beta, state)
    elif fits and SCAN.usable:
        o, state = metal_gated_delta_scan(q, k, v, g, beta, state, kernel=SCAN)
    # One chunk of T tokens already beats T single steps at T = 2 (measured: level at 2, 2 to 3 times faster at 8).
    elif T == 1:
        o, state, _ = recurrent_gated_delta_scan(q, k, v, g, beta, state)
    else:
        o, state = chunk_gated_delta_rule(q, k, v, g, beta, state)
    return o, state


def naive_gated_delta_rule(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    g: mx.array,
    beta: mx.array,
    state: mx.array,
    *,
    mask: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """The formula of `gated_delta_rule`, token by token, for the reader; same arguments and results."""
    return naive_gated_delta_scan(q, k, v, g, beta, state, mask=mask)[:2]
