"""The gated delta rule against the recurrence in float64: chunk boundaries, head layouts, adversarial inputs, masks."""

import mlx.core as mx
import numpy as np
import pytest

from qwen_mlx.kernels import gated_delta_chunk
from qwen_mlx.kernels.gated_delta import gated_delta_rule, naive_gated_delta_rule
from tests import reference
from tests.kernels.problems import ADVERSARIAL, adversarial_problem, problem
from tests.reference import error

TOLERANCE = reference.TOLERANCE[mx.float32]

LENGTHS = [
    pytest.param(1, id="one_token"),
    pytest.param(2, id="two_tokens"),
    pytest.param(3, id="three_tokens"),
    pytest.param(8, id="short_block"),
    pytest.param(31, id="one_below_a_chunk"),
    pytest.param(32, id="one_full_chunk"),
    pytest.param(33, id="one_above_a_chunk"),
    pytest.param(63, id="two_chunks_one_pad"),
    pytest.param(64, id="two_full_chunks"),
    pytest.param(65, id="three_chunks_of_22_one_pad"),
    pytest.param(200, id="seven_chunks_three_pads"),
]


@pytest.mark.parametrize(("Dk", "Dv"), [(32, 64), (128, 64)], ids=["narrow_keys", "wide_keys"])
@pytest.mark.parametrize("group", [1, 2, 3], ids=["equal_heads", "two_values_a_key", "three_values_a_key"])
@pytest.mark.parametrize("T", LENGTHS)
def test_equals_float64(T, group, Dk, Dv):
    inputs = problem(T, group=group, Dk=Dk, Dv=Dv)
    assert error(gated_delta_rule(*inputs), reference.gated_delta_rule(*inputs)) < TOLERANCE


@pytest.mark.parametrize("group", [1, 3], ids=["equal_heads", "three_values_a_key"])
@pytest.mark.parametrize("T", [1, 40])
def test_naive_equals_float64(T, group):
    inputs = problem(T, group=group)
    assert error(naive_gated_delta_rule(*inputs), reference.gated_delta_rule(*inputs)) < TOLERANCE


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
@pytest.mark.parametrize("T", [1, 8, 65])
def test_16_bit_inputs_are_widened_before_the_first_product(T, dtype):
    inputs = problem(T, dtype=dtype)
    o, state = gated_delta_rule(*inputs)
    assert (o.dtype, state.dtype) == (mx.float32, mx.float32)
    assert error((o, state), reference.gated_delta_rule(*inputs)) < TOLERANCE


@pytest.mark.parametrize("T", [1, 8, 32, 100], ids=["one_token", "short_block", "one_full_chunk", "four_chunks"])
@pytest.mark.parametrize("name", ADVERSARIAL)
def test_adversarial_inputs_equal_float64(name, T):
    inputs = adversarial_problem(name, T)
    assert error(gated_delta_rule(*inputs), reference.gated_delta_rule(*inputs)) < TOLERANCE


def neumann_inverse(A):
    """(I - A)(I + A^2)(I + A^4)...: the shorter form of the same inverse, wrong in float32."""
    inverse, power = mx.eye(A.shape[-1]) - A, A
    for _ in range((A.shape[-1] - 1).bit_length() - 1):
        power = power @ power
        inverse = inverse + inverse @ power
    return inverse


def test_neumann_inverse_would_be_noticed_at_near_equal_keys(monkeypatch):
    monkeypatch.setattr(gated_delta_chunk, "_unit_lower_inverse", neumann_inverse)
    harmless, fatal = adversarial_problem("random", 32), adversarial_problem("near_equal_keys_full_writes", 32)
    assert error(gated_delta_rule(*harmless), reference.gated_delta_rule(*harmless)) < TOLERANCE
    assert error(gated_delta_rule(*fatal), reference.gated_delta_rule(*fatal)) > 1000 * TOLERANCE


@pytest.mark.parametrize("C", [1, 2, 3, 4, 5, 16, 17, 31, 32])
def test_unit_lower_inverse_of_any_size(C):
    A = np.tril(np.random.default_rng(C).uniform(-1, 1, (3, C, C)), -1).astype(np.float32) / np.sqrt(C)
    inverse = gated_delta_chunk._unit_lower_inverse(mx.array(A))
    assert error([inverse], [np.linalg.inv(np.eye(C) + A.astype(np.float64))]) < TOLERANCE


def run_pieces(inputs, lengths):
    """The rule over consecutive pieces, the state carried from one to the next."""
    *tokens, state = inputs
    outputs, start = [], 0
    for length in lengths:
        o, state = gated_delta_rule(*(x[:, start : start + length] for x in tokens), state)
        outputs.append(o)
        start += length
    return mx.concatenate(outputs, axis=1), state


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize(
    "lengths",
    [
        pytest.param([1] * 70, id="single_tokens"),
        pytest.param([69, 1], id="prefill_then_decode"),
        pytest.param([1, 64, 5], id="decode_then_prefill"),
        pytest.param([31, 33, 6], id="either_side_of_a_chunk"),
        pytest.param([8] * 8 + [6], id="verify_blocks"),
    ],
)
def test_pieces_equal_the_whole(lengths):
    inputs = problem(70)
    whole = [np.array(x, np.float64) for x in gated_delta_rule(*inputs)]
    assert error(run_pieces(inputs, lengths), whole) < TOLERANCE


def left_padded(rule, pad, T):
    inputs = problem(pad + T)
    *tokens, state = inputs
    mask = mx.array(np.stack([np.arange(pad + T) >= pad, np.ones(pad + T, bool)]))
    o, padded_state = rule(*inputs, mask=mask)
    alone = reference.gated_delta_rule(*(x[:1, pad:] for x in tokens), state[:1])
    full = reference.gated_delta_rule(*(x[1:] for x in tokens), state[1:])
    return max(error((o[:1, pad:], padded_state[:1]), alone), error((o[1:], padded_state[1:]), full))


LEFT = pytest.mark.parametrize(("pad", "T"), [(1, 1), (3, 5), (30, 10), (40, 33)])


@LEFT
@pytest.mark.usefixtures("anywhere")
def test_left_padded_row_equals_the_unpadded_one(pad, T):
    assert left_padded(gated_delta_rule, pad, T) < TOLERANCE


@LEFT
def test_naive_left_padded_row_equals_the_unpadded_one(pad, T):
    assert left_padded(naive_gated_delta_rule, pad, T) < TOLERANCE


def right_padded(rule, T, pad):
    inputs = problem(T + pad, B=1)
    *tokens, state = inputs
    o, padded_state = rule(*inputs, mask=mx.arange(T + pad)[None] < T)
    return error((o[:, :T], padded_state), reference.gated_delta_rule(*(x[:, :T] for x in tokens), state))


RIGHT = pytest.mark.parametrize(("T", "pad"), [(1, 7), (20, 12), (33, 31)])


@RIGHT
@pytest.mark.usefixtures("anywhere")
def test_right_padding_ends_in_the_state_of_the_last_real_token(T, pad):
    assert right_padded(gated_delta_rule, T, pad) < TOLERANCE


@RIGHT
def test_naive_right_padding_ends_in_the_state_of_the_last_real_token(T, pad):
    assert right_padded(naive_gated_delta_rule, T, pad) < TOLERANCE


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize("T", [1, 8, 40], ids=["one_token", "short_block", "two_chunks"])
@pytest.mark.parametrize("g", [-1.0, -np.inf], ids=["decay", "zero_decay"])
def test_masked_tokens_leave_the_state_to_the_last_bit(T, g):
    q, k, v, log_decay, beta, state = problem(T)
    mask = mx.zeros((2, T), dtype=mx.bool_)
    _, kept = gated_delta_rule(q, k, 1e6 * v, log_decay * 0 + g, beta, state, mask=mask)
    assert np.array_equal(np.array(kept), np.array(state))


def change(position, convert):
    def apply(inputs):
        inputs[position] = convert(inputs[position])
        return inputs

    return apply


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (change(0, lambda q: q[0]), r"q has shape \(4, 2, 32\); it must be \[B, T, Hk, Dk\]"),
        (change(2, lambda v: v[..., 0]), r"v has shape \(2, 4, 4\); it must be \[B, T, Hv, Dv\]"),
        (change(1, lambda k: k[:, 1:]), r"k has shape \(2, 3, 2, 32\); .* it must be \(2, 4, 2, 32\)"),
        (change(2, lambda v: v[:1]), r"v has shape \(1, 4, 4, 64\); .* it must be \(2, 4, 4, 64\)"),
        (change(3, lambda g: g[..., :2]), r"g has shape \(2, 4, 2\); .* it must be \(2, 4, 4\)"),
        (change(4, lambda beta: beta[..., None]), r"beta has shape \(2, 4, 4, 1\); .* it must be \(2, 4, 4\)"),
        (change(5, lambda S: S.swapaxes(-1, -2)), r"state has shape \(2, 4, 32, 64\); .* it must be \(2, 4, 64, 32\)"),
        (
            change(1, lambda k: k.astype(mx.float16)),
            "k has dtype mlx.core.float16; it must be that of q, mlx.core.float32",
        ),
        (change(5, lambda S: S.astype(mx.bfloat16)), "state has dtype mlx.core.bfloat16; it must be float32"),
        (change(3, lambda g: g.astype(mx.float16)), "g has dtype mlx.core.float16; it must be float32"),
        (lambda inputs: [*(x[:, :0] for x in inputs[:5]), inputs[5]], r"q has shape \(2, 0, 2, 32\): no token"),
        (
            lambda inputs: [*inputs[:2], *(x[:, :, :3] for x in inputs[2:5]), inputs[5][:, :3]],
            r"v \(2, 4, 3, 64\) has 3 heads, which is no multiple of the 2 heads of q \(2, 4, 2, 32\)",
        ),
    ],
)
def test_wrong_argument_is_named_with_both_shapes(spoil, message):
    with pytest.raises(ValueError, match=message):
        gated_delta_rule(*spoil(problem(4)))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (mx.ones((2, 3), dtype=mx.bool_), r"mask has shape \(2, 3\); .* it must be \(2, 4\)"),
        (mx.ones((2, 4)), "mask has dtype mlx.core.float32; it must be bool"),
    ],
    ids=["shape", "dtype"],
)
def test_wrong_mask_is_named(mask, message):
    with pytest.raises(ValueError, match=message):
        gated_delta_rule(*problem(4), mask=mask)
