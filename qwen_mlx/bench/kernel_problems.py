"""What the kernel bench runs: for a kernel and a number of tokens the inputs, every form of the work, and its bytes.

Knows neither clocks nor the emulator. Inputs have the dtypes that the model gives them: projections, taps and kept
columns in the dtype of activations, all else in float32.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from qwen_mlx.kernels.activations import sigmoid, silu, softplus
from qwen_mlx.kernels.add_rms_norm import ADD_RMS_NORM, add_rms_norm, metal_add_rms_norm, naive_add_rms_norm
from qwen_mlx.kernels.backend import Kernel, distrusted
from qwen_mlx.kernels.causal_conv1d import CONV, causal_conv1d, conv_fits, metal_causal_conv1d, naive_causal_conv1d
from qwen_mlx.kernels.gated_delta import gated_delta_rule, naive_gated_delta_rule
from qwen_mlx.kernels.gated_delta_arguments import kernels_fit
from qwen_mlx.kernels.gated_delta_chunk import CHUNK, metal_gated_delta_chunk
from qwen_mlx.kernels.gated_delta_replay import (
    gated_delta_replay,
    metal_gated_delta_replay,
    naive_gated_delta_replay,
)
from qwen_mlx.kernels.gated_delta_scan import (
    REPLAY,
    SCAN,
    SCAN_WITH_TAPE,
    Tape,
    gated_delta_scan,
    metal_gated_delta_scan,
    naive_gated_delta_scan,
)
from qwen_mlx.kernels.gated_delta_step import STEP, StepWeights, gated_delta_step, naive_gated_delta_step, step_fits
from qwen_mlx.kernels.qk_norm_rope import QK_NORM_ROPE, heads_fit, naive_qk_norm_rope, qk_norm_rope
from qwen_mlx.kernels.random_inputs import (
    EPS,
    THETA,
    AttentionSizes,
    Sizes,
    random_columns,
    random_heads,
    random_step,
    random_sum,
    random_tokens,
)
from qwen_mlx.kernels.self_check import DELTA_CHECKS

Form = Callable[..., Sequence[mx.array]]
"""Inputs to results."""
Arrays = tuple[mx.array, ...]

PLAIN, MLX = "plain MLX", "mx.fast.gated_delta_update"
SCALAR_BYTES = 4


@dataclass(frozen=True)
class Problem:
    """`forms` by name: the kernels that fit, then plain MLX and what MLX has itself; `naive` says what is right.

    `bytes_to_move`: each byte of input and output once. `carry`: the number of the result, and of the input that it can
    take the place of, by which a run follows the one before it.
    """

    kernel: Kernel
    tokens: int
    inputs: Arrays
    forms: dict[str, Form]
    naive: Form
    bytes_to_move: int
    carry: tuple[int, int]
    note: str = ""

    @property
    def fits(self) -> bool:
        """Whether the kernel is written for these sizes."""
        return self.kernel.label in self.forms


Maker = Callable[[Any, int], Problem]
"""A problem of these sizes, of the Gated DeltaNet or the other layers, and so many tokens."""


def step(sizes: Sizes, tokens: int) -> Problem:
    """`gated_delta_step`, which has one token."""
    assert tokens == 1
    (qkv, z, a, b), weights, kept, state = random_step(sizes)
    inputs = (qkv, z, a, b, weights.taps, kept, weights.A_log, weights.dt_bias, weights.gain, state)

    def fused(form: Form) -> Form:
        def call(*inputs: mx.array) -> Sequence[mx.array]:
            *projected, taps, kept, A_log, dt_bias, gain, state = inputs
            return form(tuple(projected), StepWeights(taps, A_log, dt_bias, gain, EPS), kept, state)

        return call

    def apart(*inputs: mx.array) -> Sequence[mx.array]:
        qkv, z, a, b, taps, kept, A_log, dt_bias, gain, state = inputs
        q, k, v, kept = causal_conv1d(qkv, taps, kept, key_heads=sizes.key_heads, key_dim=sizes.key_dim)
        g = -mx.exp(A_log) * softplus(a.astype(mx.float32) + dt_bias)
        heads = (1, 1, sizes.value_heads, sizes.value_dim)
        o, state = gated_delta_rule(q, k, v.reshape(heads), g, sigmoid(b), state)
        y = mx.fast.rms_norm(o, gain, EPS).reshape(z.shape) * silu(z)
        return y.astype(qkv.dtype), kept, state

    forms = {STEP.label: fused(gated_delta_step)} if step_fits(sizes.taps, *sizes.heads) else {}
    forms[PLAIN] = _plainly(apart)
    moved = _bytes(*inputs, *forms[PLAIN](*inputs)) + SCALAR_BYTES  # the norm's eps
    return Problem(STEP, 1, inputs, forms, fused(naive_gated_delta_step), moved, carry=(0, 1))


def scan(sizes: Sizes, tokens: int) -> Problem:
    """`gated_delta_scan` without a tape: the delta rule."""
    inputs = random_tokens(sizes, tokens)
    forms: dict[str, Form] = {}
    if kernels_fit(*sizes.heads):
        forms[SCAN.label] = lambda *inputs: metal_gated_delta_scan(*inputs, kernel=SCAN)
        forms[CHUNK.label] = metal_gated_delta_chunk
    forms |= {PLAIN: _plainly(gated_delta_rule), MLX: _mlx_rule}
    moved = _bytes(*inputs, *forms[PLAIN](*inputs))
    return Problem(SCAN, tokens, inputs, forms, naive_gated_delta_rule, moved, carry=(0, 2))


def chunk(sizes: Sizes, tokens: int) -> Problem:
    """`gated_delta_chunk`: the delta rule too."""
    return replace(scan(sizes, tokens), kernel=CHUNK)


def scan_with_tape(sizes: Sizes, tokens: int) -> Problem:
    """`gated_delta_scan` with a tape, which MLX's own has not."""
    inputs = random_tokens(sizes, tokens)

    def flat(form: Callable[..., tuple[mx.array, mx.array, Tape]]) -> Form:
        def call(*inputs: mx.array) -> Sequence[mx.array]:
            o, state, tape = form(*inputs)
            return o, state, tape.delta

        return call

    forms: dict[str, Form] = {}
    if kernels_fit(*sizes.heads):
        forms[SCAN_WITH_TAPE.label] = lambda *inputs: metal_gated_delta_scan(*inputs, kernel=SCAN_WITH_TAPE)
    forms[PLAIN] = _plainly(flat(gated_delta_scan))
    moved = _bytes(*inputs, *forms[PLAIN](*inputs))
    return Problem(SCAN_WITH_TAPE, tokens, inputs, forms, flat(naive_gated_delta_scan), moved, carry=(0, 2))


def replay(sizes: Sizes, tokens: int) -> Problem:
    """`gated_delta_replay` of so many tokens from a tape of twice as many."""
    _, k, delta, g, _, state = random_tokens(sizes, 2 * tokens)
    inputs = (state, k, g, delta)

    def of_tape(form: Callable[[mx.array, Tape, int], mx.array]) -> Form:
        return lambda state, k, g, delta: [form(state, Tape(k, g, delta), tokens)]

    forms = {REPLAY.label: of_tape(metal_gated_delta_replay)} if kernels_fit(*sizes.heads) else {}
    forms[PLAIN] = _plainly(of_tape(gated_delta_replay))
    replayed = (x[:, :tokens] for x in (k, g, delta))  # the rest of the tape is not read
    moved = _bytes(state, *replayed, *forms[PLAIN](*inputs)) + SCALAR_BYTES  # n
    note = f"of {2 * tokens}"
    return Problem(REPLAY, tokens, inputs, forms, of_tape(naive_gated_delta_replay), moved, carry=(0, 0), note=note)


def conv(sizes: Sizes, tokens: int) -> Problem:
    """`causal_conv1d`."""
    inputs = random_columns(sizes, tokens)
    heads, size = sizes.key_heads, sizes.key_dim

    def of_heads(form: Form) -> Form:
        return lambda *inputs: form(*inputs, key_heads=heads, key_dim=size)

    forms: dict[str, Form] = {}
    if conv_fits(sizes.taps, size):
        forms[CONV.label] = lambda x, taps, kept: metal_causal_conv1d(x, taps, kept, heads, size, None)
    forms[PLAIN] = _plainly(of_heads(causal_conv1d))
    moved = _bytes(*inputs, *forms[PLAIN](*inputs)) + SCALAR_BYTES  # `ends` of the one sequence
    return Problem(CONV, tokens, inputs, forms, of_heads(naive_causal_conv1d), moved, carry=(3, 2))


def residual(sizes: AttentionSizes, tokens: int) -> Problem:
    """`add_rms_norm` of one token."""
    assert tokens == 1
    *inputs, eps = random_sum(sizes)

    def with_eps(form: Form) -> Form:
        return lambda *inputs: form(*inputs, eps)

    forms: dict[str, Form] = {
        ADD_RMS_NORM.label: with_eps(metal_add_rms_norm),
        PLAIN: _plainly(with_eps(add_rms_norm)),
    }
    moved = _bytes(*inputs, *forms[PLAIN](*inputs)) + SCALAR_BYTES  # eps
    return Problem(ADD_RMS_NORM, 1, tuple(inputs), forms, with_eps(naive_add_rms_norm), moved, carry=(0, 0))


def heads(sizes: AttentionSizes, tokens: int) -> Problem:
    """`qk_norm_rope` of one token."""
    assert tokens == 1
    q, k, v, norms, offset = random_heads(sizes)

    def placed(form: Form) -> Form:
        """Keys and values as one input of any axes, so that a run can take those of the run before."""
        return lambda q, both: form(q, both[0, :].reshape(k.shape), both[1, :].reshape(v.shape), norms, offset)

    def turned(x: mx.array, gain: mx.array) -> mx.array:
        normed = mx.fast.rms_norm(x, gain, norms.eps).astype(x.dtype).transpose(0, 2, 1, 3)
        return mx.fast.rope(normed, norms.rotary_dim, traditional=False, base=THETA, scale=1.0, offset=offset)

    def apart(q: mx.array, k: mx.array, v: mx.array, *_: Any) -> Sequence[mx.array]:
        queries, keys = turned(q[..., : sizes.head_dim], norms.q_gain), turned(k, norms.k_gain)
        return queries, mx.stack([keys, v.transpose(0, 2, 1, 3)])

    forms: dict[str, Form] = {}
    if heads_fit(sizes.head_dim, sizes.rotary_dim):
        forms[QK_NORM_ROPE.label] = placed(qk_norm_rope)
    forms[PLAIN] = placed(apart)
    queries = q[..., : sizes.head_dim]  # the gates beside them are not read
    tables = 4 * (norms.rotary_dim // 2) + 2 * SCALAR_BYTES  # frequencies, eps, offset
    moved = _bytes(queries, k, v, norms.q_gain, norms.k_gain, *apart(q, k, v)) + tables
    inputs = q, mx.stack([k, v])
    return Problem(QK_NORM_ROPE, 1, inputs, forms, placed(naive_qk_norm_rope), moved, carry=(1, 1))


ATTENTION_CASES: tuple[tuple[Maker, int], ...] = ((residual, 1), (heads, 1))
CASES: tuple[tuple[Maker, int], ...] = (
    (step, 1),
    *((scan, T) for T in (2, 8, 16)),
    *((scan_with_tape, T) for T in (2, 8, 16)),
    (replay, 4),
    (chunk, 512),
    (conv, 8),
    (conv, 512),
)


def _mlx_rule(*inputs: mx.array) -> Sequence[mx.array]:
    """MLX's own, on float32 inputs, as it casts the decay to their dtype; it wants the decay, not its logarithm."""
    q, k, v, g, beta, state = inputs
    return mx.fast.gated_delta_update(q, k, v, mx.exp(g), beta, initial_state=state)


def _plainly(operation: Form) -> Form:
    """`operation` in plain MLX, as where there is no Metal."""

    def call(*inputs: mx.array) -> Sequence[mx.array]:
        with _no_kernels():
            return operation(*inputs)

    return call


@contextmanager
def _no_kernels() -> Iterator[None]:
    before = set(distrusted)
    distrusted.update(kernel.label for kernel in (*DELTA_CHECKS, CONV, STEP, ADD_RMS_NORM))
    try:
        yield
    finally:
        distrusted.intersection_update(before)


def _bytes(*arrays: mx.array) -> int:
    return sum(x.nbytes for x in arrays)
