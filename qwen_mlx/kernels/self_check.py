"""Whether the Metal kernels are right on this very machine: each is run once, in the sizes of the model at hand.

They were proved on an emulator, which knows neither this GPU nor its compiler. Plain MLX does the work of a wrong one.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import cache, partial

import mlx.core as mx

from qwen_mlx.kernels.add_rms_norm import ADD_RMS_NORM, metal_add_rms_norm, naive_add_rms_norm
from qwen_mlx.kernels.backend import Kernel, distrusted
from qwen_mlx.kernels.causal_conv1d import CONV, conv_fits, metal_causal_conv1d, naive_causal_conv1d
from qwen_mlx.kernels.gated_delta import SCAN_TOKENS, naive_gated_delta_rule
from qwen_mlx.kernels.gated_delta_arguments import kernels_fit
from qwen_mlx.kernels.gated_delta_chunk import CHUNK, metal_gated_delta_chunk
from qwen_mlx.kernels.gated_delta_replay import metal_gated_delta_replay
from qwen_mlx.kernels.gated_delta_scan import (
    REPLAY,
    SCAN,
    SCAN_WITH_TAPE,
    metal_gated_delta_scan,
    naive_gated_delta_scan,
)
from qwen_mlx.kernels.gated_delta_step import STEP, gated_delta_step, naive_gated_delta_step, step_fits
from qwen_mlx.kernels.qk_norm_rope import QK_NORM_ROPE, heads_fit, naive_qk_norm_rope, qk_norm_rope
from qwen_mlx.kernels.random_inputs import (
    AttentionSizes,
    Sizes,
    random_columns,
    random_heads,
    random_step,
    random_sum,
    random_tokens,
)

# Far above what the order of a sum moves (some 1e-6 in float32, 2^-8 where bfloat16 rounds), far below any mistake.
TOLERANCE = {mx.float32: 1e-4, mx.float16: 1e-2, mx.bfloat16: 2e-2}

Pair = tuple[Sequence[mx.array], Sequence[mx.array]]
"""What a kernel gave, and what its naive reference gave."""


@cache
def check_kernels(sizes: Sizes, attention: AttentionSizes) -> None:
    """Run every kernel once against its naive reference; put those that differ on `distrusted` and warn of them.

    Without Metal there is nothing to check, nor of kernels that are not written for these sizes.
    """
    checks = checks_for(sizes, attention)
    wrong = [kernel.label for kernel, check in checks.items() if kernel.usable and trouble(check)]
    if wrong:
        distrusted.update(wrong)
        warnings.warn(
            f"Metal kernels that are wrong on this GPU are not used, plain MLX does their work: {', '.join(wrong)}. "
            "Please report this with the name of the GPU and the version of macOS.",
            stacklevel=2,
        )


def checks_for(sizes: Sizes, attention: AttentionSizes) -> dict[Kernel, Callable[[], Pair]]:
    """The kernels that are written for these sizes, each with what runs it and its reference."""
    checks: dict[Kernel, Callable[[], Pair]] = {ADD_RMS_NORM: lambda: _check_sum(attention)}
    if conv_fits(sizes.taps, sizes.key_dim):
        checks[CONV] = partial(_check_conv, sizes)
    if step_fits(sizes.taps, *sizes.heads):
        checks[STEP] = partial(_check_step, sizes)
    if kernels_fit(*sizes.heads):
        checks |= {kernel: partial(check, sizes) for kernel, check in DELTA_CHECKS.items()}
    if heads_fit(attention.head_dim, attention.rotary_dim):
        checks[QK_NORM_ROPE] = lambda: _check_heads(attention)
    return checks


def trouble(check: Callable[[], Pair]) -> str:
    """What is wrong with the results of `check`: nothing if each is as near to what is expected as its dtype allows."""
    try:
        results, expected = check()
        mx.eval(results)
    # A text that does not compile; more threads than the pipeline allows, or a shape that MLX does not take.
    except (RuntimeError, ValueError) as error:
        return f"does not run: {str(error).splitlines()[0]}"
    for result, right in zip(results, expected, strict=True):
        if result.shape != right.shape:
            return f"wrong: shape {result.shape} for {right.shape}"
        wide = right.astype(mx.float32)
        off, size = mx.abs(result.astype(mx.float32) - wide).max(), mx.abs(wide).max()
        if not (off <= TOLERANCE[result.dtype] * size).item():  # NaN is wrong as well
            return f"wrong: off by {off.item():.1e} where the largest value is {size.item():.1e}"
    return ""


def _check_sum(sizes: AttentionSizes) -> Pair:
    inputs = random_sum(sizes)
    return metal_add_rms_norm(*inputs), naive_add_rms_norm(*inputs)


def _check_heads(sizes: AttentionSizes) -> Pair:
    inputs = random_heads(sizes)
    return qk_norm_rope(*inputs), naive_qk_norm_rope(*inputs)


def _check_conv(sizes: Sizes) -> Pair:
    inputs = random_columns(sizes, 2)
    naive = naive_causal_conv1d(*inputs, key_heads=sizes.key_heads, key_dim=sizes.key_dim)
    return metal_causal_conv1d(*inputs, sizes.key_heads, sizes.key_dim, None), naive


def _check_step(sizes: Sizes) -> Pair:
    (qkv, z, a, b), weights, conv_state, state = random_step(sizes)
    qkvz, ab = mx.concatenate([qkv, z], axis=-1), mx.concatenate([a, b], axis=-1)  # as joint projections give them
    starts = qkv.shape[-1], a.shape[-1]
    joined = gated_delta_step((qkvz, qkvz, ab, ab), weights, conv_state, state, starts)
    return joined, naive_gated_delta_step((qkv, z, a, b), weights, conv_state, state)


def _check_scan(sizes: Sizes) -> Pair:
    inputs = random_tokens(sizes, 2)
    return metal_gated_delta_scan(*inputs, kernel=SCAN), naive_gated_delta_rule(*inputs)


def _check_scan_with_tape(sizes: Sizes) -> Pair:
    inputs = random_tokens(sizes, 2)
    o, state, tape = naive_gated_delta_scan(*inputs)
    return metal_gated_delta_scan(*inputs, kernel=SCAN_WITH_TAPE), (o, state, tape.delta)


def _check_replay(sizes: Sizes) -> Pair:
    inputs = random_tokens(sizes, 2)
    _, state, tape = naive_gated_delta_scan(*inputs)
    return [metal_gated_delta_replay(inputs[-1], tape, 2)], [state]


def _check_chunk(sizes: Sizes) -> Pair:
    inputs = random_tokens(sizes, SCAN_TOKENS + 1)  # a whole chunk and a ragged one
    return metal_gated_delta_chunk(*inputs), naive_gated_delta_rule(*inputs)


DELTA_CHECKS: dict[Kernel, Callable[[Sizes], Pair]] = {
    SCAN: _check_scan,
    SCAN_WITH_TAPE: _check_scan_with_tape,
    REPLAY: _check_replay,
    CHUNK: _check_chunk,
}
