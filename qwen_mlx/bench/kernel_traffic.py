"""The bytes that a kernel moves, counted by the Metal emulator of the tests, which only a checkout has.

Lengths beyond those of COUNTED are extended from two of them, and exactly: past its first block of tokens a kernel
does the same for every block of 16.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_mlx.bench.kernel_problems import Maker, Problem
from qwen_mlx.errors import QwenMLXError
from qwen_mlx.kernels.random_inputs import AttentionSizes, Sizes

COUNTED = (16, 32)


class NoEmulator(QwenMLXError):
    """The emulator is not here, or cannot run here; the sentence says what to do."""


@dataclass(frozen=True)
class Traffic:
    """Bytes of a kernel's arrays, without the shapes that MLX hands it.

    `distinct`: each byte read and each byte written once, the least that memory delivers. `lanes`: all that the lanes
    load and store; what the lanes of one SIMD-group read in common counts for each, though it reaches the caches once.
    `counted_at`: the tokens of the runs that were counted.
    """

    distinct: int
    lanes: int
    counted_at: tuple[int, ...]


def traffic(make: Maker, sizes: Sizes | AttentionSizes, tokens: int) -> Traffic:
    """Of the kernel of `make`, which must fit `sizes`. Raises NoEmulator."""
    lengths = lengths_to_count(tokens)
    first, *further = (_count(make(sizes, T)) for T in lengths)
    if not further:
        return first
    blocks = (tokens - lengths[0]) // (lengths[1] - lengths[0])
    return Traffic(
        distinct=first.distinct + blocks * (further[0].distinct - first.distinct),
        lanes=first.lanes + blocks * (further[0].lanes - first.lanes),
        counted_at=lengths,
    )


def lengths_to_count(tokens: int) -> tuple[int, ...]:
    """`tokens` itself, or the two lengths that a multiple of 16 beyond them is extended from."""
    short, long = COUNTED
    return (tokens,) if tokens <= long or tokens % (long - short) else COUNTED


def _count(problem: Problem) -> Traffic:
    recording, emulated_metal, unable = _emulator()
    kernel = problem.kernel
    try:
        with recording() as runs, emulated_metal():
            problem.forms[kernel.label](*problem.inputs)
    except unable as outcome:
        raise NoEmulator(f"The bytes that kernels move are not counted: {outcome}.") from None
    (run,) = runs
    buffers = [run.traffic[name] for name in (*kernel.inputs, *kernel.outputs)]
    return Traffic(
        distinct=sum(buffer.distinct_bytes_read + buffer.distinct_bytes_written for buffer in buffers),
        lanes=sum(buffer.bytes_read + buffer.bytes_written for buffer in buffers),
        counted_at=(problem.tokens,),
    )


def _emulator() -> tuple[Any, Any, tuple[type[BaseException], ...]]:
    """`recording`, `emulated_metal`, and what the latter raises where it cannot run."""
    try:
        pytest, metal_emulator, device = _import()
    except ImportError as error:
        raise NoEmulator(
            f"The bytes that kernels move are not counted, for want of {error.name}. The emulator is in the tests: "
            'in a checkout, after pip install -e ".[test]", run python -m qwen_mlx.bench kernels.'
        ) from None
    if Path(metal_emulator.__file__).parents[2] != Path(__file__).parents[2]:
        raise NoEmulator(
            "The bytes that kernels move are not counted: the emulator found here is that of another checkout; "
            "run python -m qwen_mlx.bench kernels in the folder of this one."
        )
    return metal_emulator.recording, device.emulated_metal, (pytest.skip.Exception, pytest.fail.Exception)


def _import() -> Any:
    if not TYPE_CHECKING:  # mypy would go on into the tests, which have no types to check
        import pytest

        from tests import metal_emulator
        from tests.metal_emulator import device

        return pytest, metal_emulator, device
