"""What a launch did: `recording()` collects one `Run` for each that is made inside it.

Knows no kernel: launch.py hands in the figures.
"""

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass

from tests.metal_emulator.findings import Finding


@dataclass(frozen=True)
class Traffic:
    """Bytes that a kernel's loads and stores moved in one buffer; `distinct_` counts each byte once."""

    bytes_read: int
    bytes_written: int
    distinct_bytes_read: int
    distinct_bytes_written: int


@dataclass(frozen=True)
class Run:
    """One launch that had no error. `compile_s` is 0 for a kernel that was built before.

    `notes` are findings of kinds that Options.allow lets pass. `threadgroup_bytes` is what one threadgroup declares.
    Without Options.check there are no accesses and no traffic. `overflowed`: some result, if only one in between, was
    too large for its type, or no number at all.
    """

    name: str
    text: str
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    compile_s: float
    run_s: float
    accesses: int
    simd_operations: int
    barriers: int
    threadgroup_bytes: int
    threadgroup_bytes_read: int
    threadgroup_bytes_written: int
    notes: tuple[Finding, ...]
    traffic: Mapping[str, Traffic]
    overflowed: bool


_recordings: ContextVar[tuple[list[Run], ...]] = ContextVar("metal_emulator_recordings", default=())


@contextlib.contextmanager
def recording() -> Iterator[list[Run]]:
    """Yields a list that gets a `Run` for every launch made inside, also inside an inner `recording`."""
    runs: list[Run] = []
    token = _recordings.set((*_recordings.get(), runs))
    try:
        yield runs
    finally:
        _recordings.reset(token)


def record(run: Run) -> None:
    """Adds `run` to every open recording."""
    for runs in _recordings.get():
        runs.append(run)
