"""How long the forms of a problem take: all of them in turn, the median over the rounds; a wrong form gets no time."""

import statistics
import time
from dataclasses import dataclass
from functools import partial

import mlx.core as mx

from qwen_mlx.bench.kernel_problems import Arrays, Form, Problem
from qwen_mlx.kernels.self_check import Pair, trouble

LAYERS = 24
"""Runs in a row, each on inputs of its own as the layers of a model are, so that the states come from memory."""
MOST_BYTES = 1 << 28
"""Of all these inputs together; long problems have fewer layers."""


@dataclass(frozen=True)
class Measured:
    """`seconds` of one run, None for a form that is wrong or does not run; `trouble` says which."""

    seconds: float | None
    trouble: str = ""


def measure(problem: Problem, rounds: int) -> dict[str, Measured]:
    """Every form of `problem` against the naive one first, then the right ones on the clock."""
    expected = problem.naive(*problem.inputs)
    mx.eval(expected, problem.inputs)

    def run(form: Form) -> Pair:
        return form(*problem.inputs), expected

    troubles = {name: trouble(partial(run, form)) for name, form in problem.forms.items()}
    right = {name: form for name, form in problem.forms.items() if not troubles[name]}
    layers = _layers(problem)
    for form in right.values():
        _seconds(form, layers, problem.carry)  # to warm up
    times: dict[str, list[float]] = {name: [] for name in right}
    for _ in range(rounds):
        for name, form in right.items():
            times[name].append(_seconds(form, layers, problem.carry))
    return {
        name: Measured(statistics.median(times[name]) if name in right else None, reason)
        for name, reason in troubles.items()
    }


def winner(measured: dict[str, Measured]) -> str | None:
    """The fastest form, None if none is right."""
    times = {name: one.seconds for name, one in measured.items() if one.seconds is not None}
    return min(times, key=times.__getitem__, default=None)


def _layers(problem: Problem) -> list[Arrays]:
    size = sum(x.nbytes for x in problem.inputs)
    count = max(1, min(LAYERS, MOST_BYTES // size))
    layers = [tuple(x + mx.zeros_like(x) for x in problem.inputs) for _ in range(count)]
    mx.eval(layers)
    return layers


def _seconds(form: Form, layers: list[Arrays], carry: tuple[int, int]) -> float:
    """Of one run. Each takes a result of the run before, so that none overlaps with another, as in a model.

    Python's part, which builds the graph, is not timed: for one launch it takes longer than the GPU.
    """
    result, place = carry
    carried, everything = layers[0][place], []
    for inputs in layers:
        results = form(*inputs[:place], carried, *inputs[place + 1 :])
        carried = results[result]
        everything.append(results)
    mx.synchronize()
    start = time.perf_counter()
    mx.eval(everything)
    mx.synchronize()
    return (time.perf_counter() - start) / len(layers)
