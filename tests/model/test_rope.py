"""Rotary embedding against its formula in float64, in the text form and with three axes."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from qwen_mlx.config import RopeParameters
from qwen_mlx.model.rope import RotaryEmbedding

THETA = 1e7
SECTIONS = [
    pytest.param((11, 11, 10), id="rotary_64"),
    pytest.param((6, 5, 5), id="32"),
    pytest.param((3, 3, 2), id="16"),
]
every_section = pytest.mark.parametrize("section", SECTIONS)


def axes_of(section: tuple[int, int, int]) -> list[int]:
    """0, 1, 2 (time, height, width) for each frequency: time, with height and width put in at every third place."""
    axes = [0] * sum(section)
    for axis in (1, 2):
        for j in range(axis, 3 * section[axis], 3):
            axes[j] = axis
    return axes


def float64_rope(x: mx.array, positions: np.ndarray, section: tuple[int, int, int]) -> np.ndarray:
    """x [B, H, T, Dh], positions [3, B, T]: the pair (j, j + R/2) turns by positions[axis_j] theta^(-2j/R)."""
    half = sum(section)
    turned = np.array(x.astype(mx.float32), np.float64)
    source = turned.copy()
    for j, axis in enumerate(axes_of(section)):
        angle = positions[axis][:, None] * THETA ** (-2 * j / (2 * half))  # [B, 1, T]
        a, b = source[..., j], source[..., j + half]
        turned[..., j] = a * np.cos(angle) - b * np.sin(angle)
        turned[..., j + half] = b * np.cos(angle) + a * np.sin(angle)
    return turned


def rope(section: tuple[int, int, int]) -> RotaryEmbedding:
    return RotaryEmbedding(2 * sum(section), RopeParameters(THETA, 0.25, section))


def heads(section: tuple[int, int, int], *, T: int = 40, dtype: mx.Dtype = mx.float32) -> mx.array:
    """[2, 3, T, Dh], a quarter of each head rotary."""
    return mx.array(np.random.RandomState(0).standard_normal((2, 3, T, 8 * sum(section)))).astype(dtype)


def image_positions(*, T: int = 40) -> np.ndarray:
    """[3, 2, T] with all axes different, and different in each row: some text, an image of 5 columns, text again."""
    t = np.arange(T)
    inside = (t >= 7) & (t < 27)
    row = np.stack([np.where(inside, axis, t) for axis in (7, 7 + (t - 7) // 5, 7 + (t - 7) % 5)])
    return np.stack([row, row[:, ::-1] + 100], axis=1)


def error(ours: mx.array, exact: np.ndarray) -> float:
    return float(np.abs(np.array(ours.astype(mx.float32), np.float64) - exact).max())


@every_section
@pytest.mark.parametrize("offset", [0, 1, 300])
def test_text_form_equals_float64(section: tuple[int, int, int], offset: int) -> None:
    x = heads(section)
    positions = np.broadcast_to(np.arange(offset, offset + 40), (3, 2, 40))
    assert error(rope(section)(x, offset), float64_rope(x, positions, section)) < 2e-4


@every_section
def test_three_axes_equal_float64(section: tuple[int, int, int]) -> None:
    x, positions = heads(section), image_positions()
    assert error(rope(section)(x, 0, mx.array(positions)), float64_rope(x, positions, section)) < 1e-4


@every_section
def test_three_axes_on_a_far_position(section: tuple[int, int, int]) -> None:
    # One rounding of an angle near 1e5 is 0.004 rad; theta^(-2j/R) brings a second one.
    x, positions = heads(section), image_positions() + 100_000
    assert error(rope(section)(x, 0, mx.array(positions)), float64_rope(x, positions, section)) < 0.08


@every_section
@pytest.mark.parametrize("offset", [0, 300])
def test_equal_axes_are_the_text_form(section: tuple[int, int, int], offset: int) -> None:
    x = heads(section)
    positions = mx.broadcast_to(mx.arange(offset, offset + 40), (3, 2, 40))
    three = np.array(rope(section)(x, 0, positions), np.float64)
    assert error(rope(section)(x, offset), three) < 2e-4


@every_section
@pytest.mark.parametrize("axis", [0, 1, 2], ids=["time", "height", "width"])
def test_each_axis_turns_its_own_frequencies_only(section: tuple[int, int, int], axis: int) -> None:
    x, positions = mx.ones((1, 1, 1, 8 * sum(section))), np.zeros((3, 1, 1), np.int32)
    positions[axis] = 3
    turned = np.array(rope(section)(x, 0, mx.array(positions)))[0, 0, 0, : sum(section)] != 1
    # The slowest frequencies turn by less than float32 sees, so only the first half is asked for completely.
    mine = np.array(axes_of(section)) == axis
    assert not turned[~mine].any()
    assert turned[mine][: mine.sum() // 2].all()


@pytest.mark.parametrize(
    ("axis", "expected"),
    [(1, [1, 4, 7, 10, 13, 16, 19, 22, 25, 28, 31]), (2, [2, 5, 8, 11, 14, 17, 20, 23, 26, 29])],
    ids=["height", "width"],
)
def test_frequencies_of_the_released_section(axis: int, expected: list[int]) -> None:
    assert np.flatnonzero(rope((11, 11, 10))._axis == axis).tolist() == expected


@every_section
@pytest.mark.parametrize("positions", [None, image_positions()], ids=["text", "three_axes"])
def test_what_is_not_rotary_passes_through(section: tuple[int, int, int], positions: Any) -> None:
    x = heads(section)
    turned = rope(section)(x, 5, None if positions is None else mx.array(positions))
    assert mx.array_equal(turned[..., 2 * sum(section) :], x[..., 2 * sum(section) :])


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("form", ["text", "three_axes"])
def test_angles_stay_float32_in_16_bits(dtype: mx.Dtype, form: str) -> None:
    # Without Metal, mx.fast.rope rounds cosine, sine and products too: a unit or two of values up to 4. An angle near
    # 500 in 16 bits is off by up to 2 rad (bfloat16) or 0.25 rad (float16).
    section, x = (11, 11, 10), heads((11, 11, 10), dtype=dtype)
    positions = np.broadcast_to(np.arange(500, 540), (3, 2, 40))
    turned = rope(section)(x, 500, None if form == "text" else mx.array(positions))
    assert turned.dtype == dtype
    assert error(turned, float64_rope(x, positions, section)) < 8 * (2**-8 if dtype == mx.bfloat16 else 2**-11)
