"""Schedules, orders of addition, contraction: each option does what it says."""

import dataclasses

import mlx.core as mx
import numpy as np
import pytest

from tests import metal_emulator
from tests.metal_emulator.launches import SUM, run


@pytest.fixture(autouse=True)
def emulator():
    metal_emulator.require()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"order": "sideways"}, "order is 'sideways'; it must be one of forward, reverse, random"),
        ({"reduce_order": "up"}, "reduce_order is 'up'; it must be one of ascending, descending, sequential"),
        ({"allow": ("race",)}, "allow has 'race'; the kinds of findings are out-of-bounds, "),
        ({"timeout_s": 0}, "timeout_s is 0; it must be positive"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_option_is_named(options, words):
    with pytest.raises(ValueError, match=words), metal_emulator.using(**options):
        pass


def test_unknown_option_is_refused():
    with pytest.raises(TypeError, match="compiler"), metal_emulator.using(compiler="clang"):
        pass


def test_options_hold_inside_and_add_up():
    with metal_emulator.using(order="reverse"), metal_emulator.using(fma=True) as options:
        assert options == dataclasses.replace(metal_emulator.Options(), order="reverse", fma=True)


def first_to_come(**options):
    """Which of 64 threads an atomic counter serves first, of each of two groups."""
    source = """
        int turn = atomic_fetch_add_explicit(&out[0], 1, memory_order_relaxed);
        if (turn == 0) atomic_store_explicit(&out[1], int(thread_position_in_grid.x), memory_order_relaxed);
    """
    with metal_emulator.using(**options):
        out = run(source, [], shape=(2,), dtype=mx.int32, threads=64, atomic_outputs=True, call={"init_value": 0})
    return out[1].item()


@pytest.mark.parametrize(("order", "thread"), [("forward", 0), ("reverse", 63)])
def test_order_of_threads(order, thread):
    assert first_to_come(order=order) == thread


def test_random_order_is_drawn_from_the_seed():
    firsts = [first_to_come(order="random", seed=seed) for seed in range(8)]
    assert len(set(firsts)) > 2
    assert firsts == [first_to_come(order="random", seed=seed) for seed in range(8)]


@pytest.mark.parametrize(
    ("reduce_order", "total"),
    [
        # Of lanes 0 to 15, 1e8 keeps the last eight only, which come as one; likewise of lanes 16 to 31.
        pytest.param("ascending", 16, id="ascending"),
        # 1e8 and -1e8 meet first.
        pytest.param("descending", 30, id="descending"),
        # The ones between 1e8 and -1e8 are lost one by one.
        pytest.param("sequential", 15, id="sequential"),
    ],
)
def test_order_of_additions(reduce_order, total):
    values = np.ones(32, np.float32)
    values[0], values[16] = 1e8, -1e8
    with metal_emulator.using(reduce_order=reduce_order):
        assert run(SUM, [mx.array(values)], shape=(1,), threads=32).item() == total


@pytest.mark.parametrize(("fma", "zero"), [(False, True), (True, False)], ids=["rounded_twice", "contracted"])
def test_contraction(fma, zero):
    """(1 + e)^2 - (1 + 2 e) is e^2, or 0 if the product is rounded first."""
    source = "out[thread_position_in_grid.x] = x[0] * x[0] - y[0];"
    tiny = 2.0**-20
    with metal_emulator.using(fma=fma):
        out = run(source, [mx.array([1 + tiny]), mx.array([1 + 2 * tiny])])
    assert (out.item() == 0) is zero


def test_denormals_are_flushed():
    out = run("out[thread_position_in_grid.x] = x[0] * 0.5f;", [mx.array([float(np.finfo(np.float32).tiny)])])
    assert out.item() == 0
