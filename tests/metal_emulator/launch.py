"""One run of a built kernel: hands buffers and grid to the runtime, and turns its findings into errors and a `Run`.

In: a shared library of build.py, `Buffer`s, grid and options. Out: a `Run`, the outputs in the buffers. Knows nothing
of arrays or of how the text came about. The structures mirror runtime/abi.h.
"""

import ctypes
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path

from tests.metal_emulator import build
from tests.metal_emulator.buffers import Buffer
from tests.metal_emulator.findings import Finding, MetalEmulatorError
from tests.metal_emulator.options import ORDERS, REDUCE_ORDERS, Options
from tests.metal_emulator.recording import Run, Traffic, record
from tests.metal_emulator.translation import ENTRY_POINT

MOST_THREADS = 1024
MOST_BUFFERS = 31

# Of the launch as a whole: named alike in mtl_launch and in Run.
_FIGURES = (
    "accesses",
    "simd_operations",
    "barriers",
    "threadgroup_bytes",
    "threadgroup_bytes_read",
    "threadgroup_bytes_written",
)

_counter = ctypes.c_ulonglong


class _Buffer(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("data", ctypes.c_void_p),
        ("bytes", _counter),
        ("offset", _counter),
        ("gaps", ctypes.c_void_p),
        ("role", ctypes.c_int),
        ("granule", ctypes.c_int),
        *((field.name, _counter) for field in fields(Traffic)),
    ]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("entry", ctypes.c_void_p),
        ("buffers", ctypes.POINTER(_Buffer)),
        ("buffer_count", ctypes.c_int),
        ("grid", ctypes.c_uint * 3),
        ("threadgroup", ctypes.c_uint * 3),
        ("order", ctypes.c_int),
        ("seed", ctypes.c_int),
        ("checked", ctypes.c_int),
        ("reduce_order", ctypes.c_int),
        ("timeout_s", ctypes.c_double),
        *((figure, _counter) for figure in _FIGURES),
        ("image_base", _counter),
        ("overflowed", ctypes.c_int),
    ]


class _Finding(ctypes.Structure):
    _fields_ = [
        ("kind", ctypes.c_char * 64),
        ("message", ctypes.c_char * 640),
        ("buffer", ctypes.c_char * 64),
        ("threadgroup", ctypes.c_uint * 3),
        ("thread", ctypes.c_uint * 3),
        ("has_thread", ctypes.c_int),
        ("line", ctypes.c_int),
        ("program_counter", _counter),
    ]


def check_dispatch(grid: Sequence[int], threadgroup: Sequence[int]) -> None:
    """ValueError for what no GPU can run; the words for a threadgroup that is too large are MLX's."""
    for name, sizes in (("grid", grid), ("threadgroup", threadgroup)):
        if min(sizes) < 1:
            raise ValueError(f"[metal_kernel] {name} is {tuple(sizes)}; every size must be positive.")
    threads = threadgroup[0] * threadgroup[1] * threadgroup[2]
    if threads > MOST_THREADS:
        raise ValueError(
            f"Thread group size ({threads}) is greater than  the maximum allowed threads per threadgroup "
            f"({MOST_THREADS})."
        )


def _structure(buffer: Buffer) -> _Buffer:
    return _Buffer(
        name=buffer.name.encode(),
        data=buffer.data.ctypes.data,
        bytes=buffer.data.nbytes,
        offset=buffer.offset,
        gaps=None if buffer.gaps is None else buffer.gaps.ctypes.data,
        role=buffer.role,
        granule=buffer.granule,
    )


def _collect_findings(count: int, library: Path, image_base: int) -> list[Finding]:
    findings, raw = [], _Finding()
    for index in range(count):
        build.runtime().mtl_get_finding(index, ctypes.byref(raw))
        line = raw.line if raw.line > 0 else None
        if raw.program_counter:
            # A return address lies behind the call that it returns to.
            line = build.line_of(library, raw.program_counter - 1 - image_base)
        findings.append(
            Finding(
                kind=raw.kind.decode(),
                message=raw.message.decode(errors="replace"),
                line=line,
                buffer=raw.buffer.decode() or None,
                threadgroup=tuple(raw.threadgroup) if raw.has_thread else None,
                thread=tuple(raw.thread) if raw.has_thread else None,
            )
        )
    return findings


def _traffic(structures: Sequence[_Buffer]) -> dict[str, Traffic]:
    figures = [field.name for field in fields(Traffic)]
    return {s.name.decode(): Traffic(*(getattr(s, figure) for figure in figures)) for s in structures}


def _request(
    kernel: ctypes.CDLL,
    structures: Sequence[_Buffer],
    grid: Sequence[int],
    threadgroup: Sequence[int],
    options: Options,
) -> _Launch:
    return _Launch(
        entry=ctypes.cast(getattr(kernel, ENTRY_POINT), ctypes.c_void_p),
        buffers=structures,
        buffer_count=len(structures),
        grid=tuple(grid),
        # As MLX: no threadgroup is larger than the grid.
        threadgroup=tuple(map(min, threadgroup, grid)),
        order=ORDERS.index(options.order),
        seed=options.seed,
        checked=options.check,
        reduce_order=REDUCE_ORDERS.index(options.reduce_order),
        timeout_s=options.timeout_s,
    )


def launch(
    name: str,
    library: Path,
    buffers: Sequence[Buffer],
    *,
    grid: Sequence[int],
    threadgroup: Sequence[int],
    options: Options,
    text: str = "",
    compile_s: float = 0.0,
    function_constants: Mapping[str, tuple[type, object]] | None = None,
) -> Run:
    """Runs the kernel over the grid and records the `Run`. MetalEmulatorError if a finding is not allowed.

    function_constants: the values of the program's `constant` variables, each with its ctypes type.
    """
    check_dispatch(grid, threadgroup)
    if len(buffers) > MOST_BUFFERS:
        raise ValueError(f"{name} has {len(buffers)} buffers; Metal binds at most {MOST_BUFFERS}.")
    kernel = build.load_kernel(library)
    for variable, (kind, value) in (function_constants or {}).items():
        kind.in_dll(kernel, variable).value = value
    structures = (_Buffer * len(buffers))(*map(_structure, buffers))
    request = _request(kernel, structures, grid, threadgroup, options)
    started = time.perf_counter()
    count = build.runtime().mtl_run(ctypes.byref(request))
    run_s = time.perf_counter() - started
    if count < 0:
        raise MemoryError(f"{name}: the emulator could not map its memory")
    findings = _collect_findings(count, library, request.image_base)
    if errors := [finding for finding in findings if finding.kind not in options.allow]:
        raise MetalEmulatorError(name, errors, text)
    run = Run(
        name=name,
        text=text,
        grid=tuple(grid),
        threadgroup=tuple(request.threadgroup),
        compile_s=compile_s,
        run_s=run_s,
        notes=tuple(findings),
        traffic=_traffic(structures) if options.check else {},
        overflowed=bool(request.overflowed),
        **{figure: getattr(request, figure) for figure in _FIGURES},
    )
    record(run)
    return run
