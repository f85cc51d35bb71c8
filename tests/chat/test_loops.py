"""Circles: which repetitions are noticed, and when."""

import random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qwen_mlx.chat.loops import repeats


def looks(tokens: list[int]) -> list[int]:
    """The lengths at which a text that grows token by token is said to go in circles."""
    return [n for n in range(len(tokens) + 1) if repeats(tokens[:n])]


def some(count: int, seed: int, kinds: int = 1000) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(kinds) for _ in range(count)]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(length=st.integers(1, 256), before=st.integers(0, 40), seed=st.integers(0, 1000))
@example(length=24, before=0, seed=0)
@example(length=256, before=0, seed=0)
@example(length=256, before=15, seed=0)
def test_a_stretch_four_times_over_is_noticed_at_the_next_look(length: int, before: int, seed: int) -> None:
    """Four times, or as often as makes 96 tokens of it."""
    stretch = some(length, seed)
    needed = before + length * max(4, -(-96 // length))
    look = -(-needed // 16) * 16
    text = some(before, seed + 1) + stretch * (look // length + 1)
    assert repeats(text[:look])


@settings(max_examples=100, deadline=None, derandomize=True)
@given(count=st.integers(0, 1500), seed=st.integers(0, 10**6))
def test_random_text_is_no_circle(count: int, seed: int) -> None:
    assert not repeats(some(count - count % 16, seed))


@pytest.mark.parametrize("length", [32, 64, 256])
def test_three_times_are_not_enough(length: int) -> None:
    assert not looks(some(208, 0) + some(length, 1) * 3)  # of whole sixteens, so that the end is looked at


@pytest.mark.parametrize("length", [1, 2, 3, 7])
def test_a_short_stretch_needs_96_tokens(length: int) -> None:
    """A row of dashes is none."""
    assert not looks((some(length, 1) * 96)[:95])


def test_a_stretch_longer_than_256_is_not_noticed() -> None:
    assert not looks(some(257, 0) * 5)


def test_one_token_that_differs_breaks_the_circle() -> None:
    text = some(8, 0) * 12
    assert repeats(text)
    assert not repeats([*text[:40], -1, *text[41:]])


def test_what_went_in_circles_earlier_is_forgotten() -> None:
    assert not repeats(some(8, 0) * 40 + some(96, 1))


def test_between_two_looks_nothing_is_noticed() -> None:
    assert looks([7] * 200) == [96, 112, 128, 144, 160, 176, 192]
