"""The kernels of the gated delta rule on the emulated device against float64, and the plain form that has a tape.

Head sizes differ from each other (square ones hide a transposed state), and lengths stand on both sides of every bound:
the chunk of 16, the 16 tokens up to which the scan serves, the SIMD-groups of eight rows and their groups of eight.
"""

import mlx.core as mx
import numpy as np
import pytest

from qwen_mlx.kernels.gated_delta import gated_delta_rule
from qwen_mlx.kernels.gated_delta_chunk import metal_gated_delta_chunk
from qwen_mlx.kernels.gated_delta_replay import gated_delta_replay
from qwen_mlx.kernels.gated_delta_scan import SCAN, Tape, gated_delta_scan, metal_gated_delta_scan
from tests import reference
from tests.kernels.problems import ADVERSARIAL, adversarial_problem, problem
from tests.metal_emulator import recording
from tests.reference import DTYPES, error, float64, within_tolerance


def scan(*inputs):
    return metal_gated_delta_scan(*inputs, kernel=SCAN)


FORMS = pytest.mark.parametrize("form", [scan, metal_gated_delta_chunk], ids=["scan", "chunk"])
LENGTHS = pytest.mark.parametrize("T", [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 200])


@FORMS
@LENGTHS
@pytest.mark.usefixtures("metal")
def test_every_length(T, form):
    inputs = problem(T, B=1, Hk=1, Dv=24)
    assert within_tolerance(form(*inputs), reference.gated_delta_rule(*inputs))


@FORMS
@pytest.mark.parametrize(
    ("Dk", "Dv", "group"),
    [
        pytest.param(32, 8, 1, id="one_simdgroup"),
        pytest.param(32, 72, 2, id="nine_simdgroups"),
        pytest.param(64, 24, 3, id="three_simdgroups"),
        pytest.param(64, 128, 1, id="two_groups_of_eight"),
        pytest.param(96, 40, 4, id="key_size_96"),
        pytest.param(128, 16, 2, id="narrow_values"),
        pytest.param(128, 136, 1, id="wide_values_ragged_group"),
        pytest.param(128, 128, 1, id="sizes_of_every_release"),
    ],
)
@pytest.mark.usefixtures("metal")
def test_every_head_size(Dk, Dv, group, form):
    inputs = problem(18, B=1, Hk=1, group=group, Dk=Dk, Dv=Dv)
    assert within_tolerance(form(*inputs), reference.gated_delta_rule(*inputs))


@FORMS
@pytest.mark.parametrize("B", [1, 2, 3, 4])
@pytest.mark.parametrize("group", [1, 2, 3, 4], ids=["equal_heads", "two_values", "three_values", "four_values"])
@pytest.mark.usefixtures("metal")
def test_every_layout_of_heads(group, B, form):
    inputs = problem(5, B=B, Hk=2, group=group, Dv=8)
    assert within_tolerance(form(*inputs), reference.gated_delta_rule(*inputs))


@FORMS
@pytest.mark.parametrize("Hv", [16, 32, 48])
@pytest.mark.usefixtures("metal")
def test_heads_of_every_release(Hv, form):
    inputs = problem(3, B=1, Hk=16, group=Hv // 16, Dv=8)
    assert within_tolerance(form(*inputs), reference.gated_delta_rule(*inputs))


@FORMS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [3, 33])
@pytest.mark.usefixtures("metal")
def test_every_dtype(T, dtype, form):
    inputs = problem(T, B=1, Hk=1, Dv=24, dtype=dtype)
    o, state = form(*inputs)
    assert (o.dtype, state.dtype) == (mx.float32, mx.float32)
    assert within_tolerance((o, state), reference.gated_delta_rule(*inputs))


@FORMS
@pytest.mark.parametrize("name", ADVERSARIAL)
@pytest.mark.usefixtures("metal")
def test_adversarial_inputs(name, form):
    inputs = adversarial_problem(name, 40, B=1, Hk=1, Dv=24)
    assert within_tolerance(form(*inputs), reference.gated_delta_rule(*inputs))


@FORMS
@pytest.mark.parametrize("name", ADVERSARIAL)
@pytest.mark.usefixtures("metal")
def test_nothing_overflows_on_the_way(name, form):
    with recording() as runs:
        form(*adversarial_problem(name, 40, B=1, Hk=1, Dv=24))
    assert not any(run.overflowed for run in runs)


@FORMS
@pytest.mark.parametrize("decay", [1.0, 0.999], ids=["no_decay", "slow_decay"])
@pytest.mark.usefixtures("metal")
def test_4096_tokens_do_not_drift(decay, form):
    """The error ratio at the end is that of a short text; in a bfloat16 state it would be some tenths."""
    q, k, v, g, beta, state = problem(4096, B=1, Hk=1, group=1, Dv=8)
    inputs = q, k, v, mx.full(g.shape, np.log(decay)), beta, state
    _, after = form(*inputs)
    assert error([after], reference.gated_delta_rule(*inputs)[1:]) < 2e-6


def same_bits(x, y):
    return np.array_equal(np.array(x).view(np.uint32), np.array(y).view(np.uint32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [1, 2, 3, 7, 8, 9, 65])
@pytest.mark.usefixtures("anywhere")
def test_scan_gives_outputs_state_and_tape(T, dtype):
    inputs = problem(T, B=1, Hk=1, Dv=24, dtype=dtype)
    o, state, tape = gated_delta_scan(*inputs)
    assert within_tolerance((o, state, tape.delta), reference.gated_delta_scan(*inputs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [0, 1, 2, 7, 8, 9])
@pytest.mark.usefixtures("anywhere")
def test_replay_is_bit_for_bit_a_scan_that_stopped(n, dtype):
    *tokens, state = problem(9, Dv=24, dtype=dtype)
    _, _, tape = gated_delta_scan(*tokens, state)
    stopped = gated_delta_scan(*(x[:, :n] for x in tokens), state)[1] if n else state
    assert same_bits(gated_delta_replay(state, tape, n), stopped)


@pytest.mark.parametrize(("Dk", "Dv", "group"), [(64, 8, 4), (96, 40, 1), (128, 136, 3)])
@pytest.mark.usefixtures("anywhere")
def test_replay_of_every_head_size(Dk, Dv, group):
    *tokens, state = problem(4, B=1, Hk=2, group=group, Dk=Dk, Dv=Dv)
    _, _, tape = gated_delta_scan(*tokens, state)
    assert same_bits(gated_delta_replay(state, tape, 3), gated_delta_scan(*(x[:, :3] for x in tokens), state)[1])


@pytest.mark.parametrize("name", ADVERSARIAL)
@pytest.mark.usefixtures("anywhere")
def test_replay_of_adversarial_inputs(name):
    *tokens, state = adversarial_problem(name, 12, B=1, Hk=1, Dv=8)
    _, _, tape = gated_delta_scan(*tokens, state)
    assert same_bits(gated_delta_replay(state, tape, 7), gated_delta_scan(*(x[:, :7] for x in tokens), state)[1])


@pytest.mark.usefixtures("anywhere")
def test_masked_tokens_leave_no_trace_on_the_tape():
    *tokens, state = problem(6, Dv=24)
    mask = mx.arange(6)[None] < mx.array([[4], [6]])
    _, after, tape = gated_delta_scan(*tokens, state, mask=mask)
    assert same_bits(after[0], gated_delta_replay(state, tape, 4)[0])
    assert same_bits(after, gated_delta_replay(state, tape, 6))


@pytest.mark.parametrize("n", [-1, 5])
def test_replay_beyond_the_tape_is_refused(n):
    *tokens, state = problem(4)
    _, _, tape = gated_delta_scan(*tokens, state)
    with pytest.raises(ValueError, match=rf"n is {n}; the tape holds 4 tokens, so it must be 0 to 4"):
        gated_delta_replay(state, tape, n)


def test_replay_on_another_state_is_refused():
    *tokens, state = problem(4)
    _, _, tape = gated_delta_scan(*tokens, state)
    with pytest.raises(ValueError, match=r"state has shape \(1, 4, 64, 32\); beside this tape it must be \(2, 4, 64"):
        gated_delta_replay(state[:1], tape, 2)


def launched(run):
    """Names of the kernels that `run` launches."""
    with recording() as runs:
        run()
    return [launch.name for launch in runs]


@pytest.mark.parametrize(
    ("T", "names"),
    [(1, ["qwen_gated_delta_scan"]), (16, ["qwen_gated_delta_scan"]), (17, ["qwen_gated_delta_chunk"])],
    ids=["one_token", "most_for_the_scan", "prefill"],
)
@pytest.mark.usefixtures("metal")
def test_the_rule_picks_its_kernel_by_length(T, names):
    assert launched(lambda: gated_delta_rule(*problem(T, B=1, Hk=1, Dv=8))) == names


@pytest.mark.parametrize(
    "sizes",
    [{"Dk": 48}, {"Dv": 12}, {"Hk": 1, "group": 5}],
    ids=["key_size_48", "value_size_12", "five_values_a_key"],
)
@pytest.mark.parametrize("T", [1, 8, 17])
@pytest.mark.usefixtures("metal")
def test_a_shape_that_no_kernel_serves_falls_to_plain_mlx(sizes, T):
    inputs = problem(T, B=1, **sizes)
    results = []
    assert launched(lambda: results.extend(gated_delta_rule(*inputs))) == []
    assert within_tolerance(results, reference.gated_delta_rule(*inputs))


@pytest.mark.usefixtures("metal")
def test_a_tape_of_a_shape_that_no_kernel_serves_is_replayed_in_plain_mlx():
    *tokens, state = problem(4, Dk=48)
    _, _, tape = gated_delta_scan(*tokens, state)
    results = []
    assert launched(lambda: results.append(gated_delta_replay(state, tape, 2))) == []
    assert same_bits(results[0], gated_delta_scan(*(x[:, :2] for x in tokens), state)[1])


@pytest.mark.usefixtures("metal")
def test_strided_inputs_are_read_as_they_are():
    """Queries and keys as the mixer might have them: views of one array, which Metal's launch makes contiguous."""
    q, k, v, g, beta, state = problem(20, B=2, Hk=2)
    views = mx.split(mx.concatenate([q, k], axis=2), 2, axis=2)
    assert within_tolerance(
        metal_gated_delta_chunk(*views, v, g, beta, state), reference.gated_delta_rule(q, k, v, g, beta, state)
    )


def test_a_tape_holds_what_the_reader_of_its_docstring_expects():
    q, k, v, g, beta, state = problem(5, B=1)
    tape = gated_delta_scan(q, k, v, g, beta, state)[2]
    assert isinstance(tape, Tape)
    assert np.array_equal(float64(tape.k), float64(k))
    assert np.array_equal(float64(tape.g), float64(g))
    assert tape.delta.shape == v.shape
