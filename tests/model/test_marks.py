"""States kept inside a chunk: at a mark they are those of a cache that took in only the tokens up to it."""

from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np
import pytest

from qwen_mlx.cache.recurrent import RecurrentCache
from qwen_mlx.cache.sequence import CHECKPOINTS, SequenceCache
from qwen_mlx.kernels.backend import gpu_generation
from qwen_mlx.kernels.gated_delta import SCAN_TOKENS
from qwen_mlx.model.qwen import Qwen
from tests.cache.test_sequence import TOLERANCE, contents, every_variant, greedy, prompt, same
from tests.metal_emulator import recording
from tests.metal_emulator.device import emulated_metal

T = 40
MARKS = [1, 2, 3, 16, 17, 31, 32, 33, T - 1, T]
"""Around the window of three columns, SCAN_TOKENS and a chunk of the delta rule, and at the end."""
STATES = 2e-5
"""Two orders of the same float32 sums; states go up to 5."""

States = list[np.ndarray]


@pytest.fixture(scope="module")
def model(model_of: Callable[[str, str], Qwen]) -> Qwen:
    return model_of("a-r1-d32", "float32")


def fed(
    model: Qwen, tokens: mx.array, *ends: int, marks: Sequence[int] = (), padding: list[int] | None = None
) -> SequenceCache:
    """A cache that took in tokens [B, T], in chunks that end at `ends` and where the tokens do."""
    cache = model.make_cache(padding)
    for chunk in mx.split(tokens, [end for end in ends if end], axis=1):
        mx.eval(model.hidden(model.embed(chunk), cache, marks=marks), cache.arrays, cache.remembered)
    return cache


def states(cache: SequenceCache) -> States:
    return [np.array(a) for layer in cache.layers if isinstance(layer, RecurrentCache) for a in layer.arrays]


def kept(cache: SequenceCache) -> dict[int, States]:
    """The states of every checkpoint, by its offset."""
    return {point.offset: [np.array(a) for pair in point.states for a in pair] for point in cache.checkpoints}


def difference(one: States, other: States) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("mark", MARKS)
@pytest.mark.parametrize("start", [0, 30])
@every_variant
def test_a_mark_has_the_states_of_its_tokens_alone(
    variant: str, start: int, mark: int, model_of: Callable[[str, str], Qwen]
) -> None:
    model, tokens = model_of(variant, "float32"), prompt(start + T)
    found = kept(fed(model, tokens, start, marks=[start + mark]))
    alone = states(fed(model, tokens[:, : start + mark], start))
    assert list(found) == [start + mark]
    assert difference(found[start + mark], alone) < STATES


@pytest.mark.skipif(gpu_generation() is not None, reason="matmuls of Metal round by the number of their rows")
@pytest.mark.parametrize("mark", [mark for mark in MARKS if mark == 1 or mark > SCAN_TOKENS])
@every_variant
def test_bit_for_bit_where_both_take_the_same_form(
    variant: str, mark: int, model_of: Callable[[str, str], Qwen]
) -> None:
    """Of 2 to SCAN_TOKENS tokens a cache by itself keeps a tape, and computes them one by one."""
    model, tokens = model_of(variant, "float32"), prompt(30 + T)
    found = kept(fed(model, tokens, 30, marks=[30 + mark]))
    assert same(found[30 + mark], states(fed(model, tokens[:, : 30 + mark], 30)))


@every_variant
def test_many_marks_of_one_chunk(variant: str, model_of: Callable[[str, str], Qwen]) -> None:
    """All of them stay, be they more than CHECKPOINTS; each goes on from the states of the one before."""
    assert len(MARKS) > CHECKPOINTS
    model, start = model_of(variant, "float32"), 30
    tokens = prompt(start + T)
    marks = [start + mark for mark in MARKS]
    found = kept(fed(model, tokens, start, marks=marks))
    assert list(found) == marks
    for mark, own in found.items():
        assert difference(own, states(fed(model, tokens[:, :mark], start))) < STATES


@pytest.mark.parametrize("marks", [[1], [16, 17], [31, 32, 33], MARKS], ids=str)
@every_variant
def test_marks_leave_the_outputs_as_they_are(
    variant: str, marks: list[int], model_of: Callable[[str, str], Qwen]
) -> None:
    model, start = model_of(variant, "float32"), 30
    tokens = prompt(start + T + 1)
    plain, marked = (fed(model, tokens[:, :start]) for _ in range(2))
    x = model.embed(tokens[:, start : start + T])
    expected = model.logits(model.hidden(x, plain))
    found = model.logits(model.hidden(x, marked, marks=[start + mark for mark in marks]))
    assert mx.abs(found - expected).max() < TOLERANCE
    assert difference(contents(marked), contents(plain)) < STATES
    assert mx.abs(model(tokens[:, -1:], marked) - model(tokens[:, -1:], plain)).max() < TOLERANCE


@pytest.mark.parametrize("length", [T, 9, 1], ids=["long", "taped", "a_token"])
@pytest.mark.parametrize("start", [0, 30])
def test_marks_outside_of_the_chunk_do_nothing(model: Qwen, start: int, length: int) -> None:
    """Those that were passed, and those still ahead: not even the tape is given up for them."""
    tokens, end = prompt(start + length), start + length
    plain, marked = (fed(model, tokens[:, :start]) if start else model.make_cache() for _ in range(2))
    x = model.embed(tokens[:, start:])
    expected, found = model.hidden(x, plain), model.hidden(x, marked, marks=[0, start - 1, start, end + 1, end + 500])
    assert marked.checkpoints == ()
    assert mx.array_equal(found, expected)
    assert same(contents(marked), contents(plain))
    assert marked.can_rewind(1) == plain.can_rewind(1)


def test_marks_of_a_text_in_chunks(model: Qwen) -> None:
    """They are given for all of the text, and each chunk takes its own; a chunk keeps those of earlier ones too."""
    tokens, marks = prompt(100), [10, 40, 55, 80]
    found = kept(fed(model, tokens, 40, 80, marks=marks))
    assert list(found) == marks
    for mark, own in found.items():
        assert difference(own, states(fed(model, tokens[:, :mark]))) < STATES


def test_of_earlier_chunks_the_newest_marks_are_kept(model: Qwen) -> None:
    found = kept(fed(model, prompt(60), 30, 40, 50, marks=[5, 10, 15, 20, 25, 35, 45]))
    assert list(found) == [20, 25, 35, 45][-CHECKPOINTS:]


@pytest.mark.parametrize("padding", [[0, 5, 33], [0, 0, 0]], ids=["padded", "rows"])
def test_of_a_batch(model: Qwen, padding: list[int]) -> None:
    tokens = prompt(T, rows=3)
    found = kept(fed(model, tokens, marks=[2, 20, 35], padding=padding))
    for mark, own in found.items():
        assert difference(own, states(fed(model, tokens[:, :mark], padding=padding))) < STATES


def test_the_window_reaches_over_the_beginning_of_the_chunk(model: Qwen) -> None:
    """After one or two tokens of a chunk, the window's other columns are those of the tokens before it."""
    tokens = prompt(30 + T)
    found = kept(fed(model, tokens, 30, marks=[31, 32, 33]))
    window = next(layer for layer in fed(model, tokens, 30).layers if isinstance(layer, RecurrentCache))
    columns = model.model.layers[0].linear_attn.in_proj_qkv(
        model.model.layers[0].input_layernorm(model.embed(tokens[:, 25:35]))
    )
    assert window.conv_state is not None
    for mark, own in found.items():
        expected = np.array(columns)[:, mark - 3 - 25 : mark - 25]
        np.testing.assert_allclose(own[0], expected, atol=STATES)


@pytest.mark.parametrize("mark", [31, 46, 47, 69])
def test_going_back_to_a_mark(model: Qwen, mark: int) -> None:
    tokens = prompt(30 + T)
    cache, fresh = fed(model, tokens, 30, marks=[mark]), fed(model, tokens[:, :mark])
    cache.back_to_checkpoint(mark)
    assert cache.offset == mark
    found, expected = greedy(model, cache, 8), greedy(model, fresh, 8)
    assert found[0] == expected[0]
    assert np.abs(found[1] - expected[1]).max() < TOLERANCE


def test_a_short_chunk_with_a_mark_inside_can_be_taken_back_as_a_whole(model: Qwen) -> None:
    tokens = prompt(39)
    cache = fed(model, tokens, 30, marks=[33])
    assert not cache.can_rewind(1)
    cache.rewind(9)
    assert same(contents(cache), contents(fed(model, tokens[:, :30])))
    assert cache.checkpoints == ()


def test_in_bfloat16_states_stay_in_float32(model_of: Callable[[str, str], Qwen]) -> None:
    cache = fed(model_of("b-r2-d64", "bfloat16"), prompt(T), marks=[20])
    ((window, state), *_) = cache.checkpoints[0].states
    assert window is not None
    assert state is not None
    assert (window.dtype, state.dtype) == (mx.bfloat16, mx.float32)


@pytest.mark.parametrize("variant", ["b-r2-d64", "e-k64-v32"])
def test_on_emulated_metal(variant: str, model_of: Callable[[str, str], Qwen]) -> None:
    """A cut hands the kernels strided parts of a chunk, of one token, of few, and of many."""
    model, tokens, marks = model_of(variant, "float32"), prompt(T), [1, 10, 29]
    plain = fed(model, tokens, marks=marks)
    with emulated_metal(), recording() as runs:
        cache = fed(model, tokens, marks=marks)
    assert {"qwen_gated_delta_scan", "qwen_gated_delta_chunk"} <= {run.name for run in runs}
    assert difference(contents(cache), contents(plain)) < STATES
    for mark, own in kept(cache).items():
        assert difference(own, kept(plain)[mark]) < STATES
