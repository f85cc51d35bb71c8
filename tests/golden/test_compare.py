"""The comparisons see what they are there to see."""

from pathlib import Path

import numpy as np
import pytest

from tests.golden.checkpoints import VARIANTS, build
from tests.golden.compare import (
    LENGTHS,
    WHOLE,
    difference,
    load,
    logits_difference,
    mean_kl,
    sketch,
    sketch_difference,
)

LARGE = np.random.RandomState(0).standard_normal((4, 64, 64))


@pytest.fixture
def golden() -> dict[str, np.ndarray]:
    return sketch("state", LARGE)


def test_sketch_of_the_same_array_agrees(golden: dict[str, np.ndarray]) -> None:
    assert sketch_difference(golden, "state", LARGE) == 0


def test_sketch_sees_a_transposed_state(golden: dict[str, np.ndarray]) -> None:
    assert sketch_difference(golden, "state", LARGE.swapaxes(-1, -2)) > 1


@pytest.mark.parametrize("element", [(0, 0, 0), (1, 63, 0), (2, 17, 40), (3, 63, 63)])
def test_sketch_sees_every_element(golden: dict[str, np.ndarray], element: tuple[int, int, int]) -> None:
    changed = LARGE.copy()
    changed[element] += 0.01
    assert sketch_difference(golden, "state", changed) == pytest.approx(0.01 / 8, rel=1e-3)


def test_sketch_sees_exchanged_heads(golden: dict[str, np.ndarray]) -> None:
    assert sketch_difference(golden, "state", LARGE[[1, 0, 2, 3]]) > 1


def test_small_array_is_stored_whole() -> None:
    small = np.ones((1, WHOLE))
    assert sketch("state", small)["state"].shape == small.shape


def test_nan_is_infinitely_far() -> None:
    assert difference(np.array([np.nan, 0.0]), np.zeros(2)) == np.inf


def test_broadcast_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(1,\)"):
        difference(np.zeros(1), np.zeros(2))


def test_logits_are_compared_beyond_the_last_row() -> None:
    golden = {"columns": np.array([0, 2]), "prompt_2_last": np.zeros(3), "prompt_2_columns": np.zeros((2, 2))}
    assert logits_difference(golden, 2, np.array([[0, 0, 0.5], [0, 0, 0]])) == 0.5


def test_kl_of_known_distributions() -> None:
    p, q = np.array([[0.5, 0.5]]), np.array([[0.25, 0.75]])
    expected = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
    assert mean_kl(np.log(p) + 7, np.log(q)) == pytest.approx(expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_golden_columns_and_last_row_tell_the_same(variant: str) -> None:
    golden = load(variant)
    for length in LENGTHS:
        last = golden[f"prompt_{length}_last"]
        assert difference(last[golden["columns"]], golden[f"prompt_{length}_columns"][-1]) == 0


def test_unknown_variant_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="nonsense"):
        build("nonsense", tmp_path)
