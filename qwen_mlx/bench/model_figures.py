"""The arithmetic of the model bench: medians, spreads, and ratios that come pair by pair. Measures nothing."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from qwen_mlx.bench.model_engines import Run

T = TypeVar("T")

# What is measured of a run, and whether more of it is better.
METRICS: dict[str, tuple[Callable[[Run], float], bool]] = {
    "prefill_tok_s": (lambda run: run.prefill_tps, True),
    "decode_tok_s": (lambda run: run.decode_tps, True),
    "first_token_s": (lambda run: run.first_s, False),
    "peak_bytes": (lambda run: run.peak_bytes, False),
}


@dataclass(frozen=True)
class Figure:
    """`spread`: (largest - smallest) / median."""

    median: float
    spread: float
    values: tuple[float, ...]


def figure(values: Sequence[float]) -> Figure:
    """Of at least one value."""
    median = statistics.median(values)
    return Figure(median, (max(values) - min(values)) / median, tuple(values))


def figures(runs: Sequence[Run]) -> dict[str, Figure]:
    return {name: figure([value(run) for run in runs]) for name, (value, _) in METRICS.items()}


def ratio(ours: Sequence[float], theirs: Sequence[float], *, more_is_better: bool) -> Figure:
    """Of every repetition's pair, how many times better ours is: above 1 we are ahead."""
    pairs = [a / b if more_is_better else b / a for a, b in zip(ours, theirs, strict=True)]
    return figure(pairs)


def ratios(ours: dict[str, Figure], theirs: dict[str, Figure]) -> dict[str, Figure]:
    return {
        name: ratio(ours[name].values, theirs[name].values, more_is_better=more_is_better)
        for name, (_, more_is_better) in METRICS.items()
    }


def alternate(engines: Sequence[T], repetitions: int) -> Iterator[list[T]]:
    """The engines in the order A B, B A, A B, ..., so that neither has the better place."""
    for repetition in range(repetitions):
        yield list(engines) if repetition % 2 == 0 else list(engines)[::-1]
