"""Compiled things: the runtime once, and one shared library for each kernel text, kept in a cache folder.

In: a C++ translation unit and the options that change its code. Out: the path of a shared library. Knows nothing of
arrays or launches. The folder is METAL_EMULATOR_CACHE, or one of this user under the temporary directory; names in it
are hashes of everything that goes in, so nothing in it is ever stale.
"""

import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
from functools import cache
from pathlib import Path

import mlx.core as mx

from tests.metal_emulator.findings import Finding, MetalCompileError
from tests.metal_emulator.options import Options

COMPILER = "g++"
FOLDER = Path(__file__).parent
SHIM = FOLDER / "shim"
RUNTIME = FOLDER / "runtime"
KERNEL_FILE = "kernel.metal"

# DWARF 5 numbers files from 0, which addr2line gets wrong where a #line names one.
_COMMON = ["-std=c++17", "-g1", "-gdwarf-4", "-fPIC", "-shared"]
_RUNTIME_FLAGS = [*_COMMON, "-O2", "-flto", "-fvisibility=hidden"]
_KERNEL_FLAGS = [
    *_COMMON,
    "-nodefaultlibs",
    "-O1",
    "-fstack-clash-protection",  # a frame cannot step over the guard of a thread's stack
    "-fsigned-char",
    "-fno-strict-aliasing",
    "-fno-tree-vectorize",
    "-fsingle-precision-constant",  # MSL has no double: 0.1 is a float
    "-Werror=uninitialized",
    "-Wno-maybe-uninitialized",
    "-Wno-attributes",
    "-Wno-literal-suffix",
    "-Wno-unknown-pragmas",
    "-fmax-errors=20",
    "-ftrack-macro-expansion=0",  # an error lies where a macro is used, not where it is defined
]
_LIBRARIES = ["-lm", "-lgcc", "-lc"]
# The __tsan_* and __ubsan_* functions that these make the compiler call are the runtime's own: hence -nodefaultlibs.
_CHECKED_FLAGS = [
    "-fsanitize=thread",
    "--param=tsan-instrument-func-entry-exit=0",
    "-fsanitize=bounds,alignment,shift,integer-divide-by-zero,signed-integer-overflow,float-cast-overflow",
    "-ftrivial-auto-var-init=pattern",
]


def mlx_include() -> Path:
    """Where the installed mlx keeps the headers of its kernels."""
    return Path(mx.__file__).parent / "include"


def cache_folder() -> Path:
    default = Path(tempfile.gettempdir()) / f"metal_emulator_{os.getuid()}"
    folder = Path(os.environ.get("METAL_EMULATOR_CACHE", default))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@cache
def _compiler_version() -> str:
    return subprocess.run([COMPILER, "-dumpfullversion"], capture_output=True, text=True, check=True).stdout.strip()


@cache
def _sources_digest() -> str:
    """Of every source that is compiled beside a kernel's text."""
    digest = hashlib.sha256()
    for path in [*_files_below(SHIM), *_files_below(RUNTIME)]:
        digest.update(path.relative_to(FOLDER).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    digest.update("\0".join([mx.__version__, _compiler_version(), platform.machine()]).encode())
    return digest.hexdigest()


def _library_path(prefix: str, *parts: str) -> Path:
    digest = hashlib.sha256("\0".join([_sources_digest(), *parts]).encode()).hexdigest()
    return cache_folder() / f"{prefix}_{digest[:24]}.so"


def _compile(library: Path, flags: list[str], sources: list[Path]) -> str | None:
    """Builds beside `library` and renames, so that two processes may do it at once. The compiler's words if it fails.

    It runs in the cache folder: nothing in the caller's directory can be included.
    """
    handle, name = tempfile.mkstemp(prefix=library.stem, suffix=".part", dir=library.parent)
    os.close(handle)
    beside = Path(name)
    command = [COMPILER, *flags, "-o", str(beside), *map(str, sources), *_LIBRARIES]
    environment = {**os.environ, "LC_ALL": "C"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=library.parent, env=environment)
    if done.returncode:
        beside.unlink()
        return done.stderr
    beside.chmod(0o755)
    beside.replace(library)
    return None


@cache
def runtime() -> ctypes.CDLL:
    """The runtime, loaded so that kernels find its functions."""
    library = _library_path("runtime", *_RUNTIME_FLAGS)
    if not library.exists():
        words = _compile(library, _RUNTIME_FLAGS, sorted(RUNTIME.glob("*.cpp")))
        if words is not None:
            raise RuntimeError(f"the emulator's runtime does not compile:\n{words}")
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def _compile_findings(words: str) -> list[Finding]:
    """Each error with its line; one in a header lies in the line of the kernel that led there, which is told before."""
    findings, line = [], None
    for said in words.splitlines():
        if place := re.match(rf"(?:\S*/)?{re.escape(KERNEL_FILE)}:(\d+):", said):
            line = int(place[1])
        if error := re.search(r": (?:fatal )?error: (.*)", said):
            findings.append(Finding("compile error", error[1], line=line))
            line = None
    return findings or [Finding("compile error", words.strip()[:4000])]


def _kernel_flags(options: Options) -> list[str]:
    flags = [*_KERNEL_FLAGS, "-I", str(SHIM), "-I", str(RUNTIME), "-I", str(mlx_include())]
    if options.check:
        flags += _CHECKED_FLAGS
    if not options.fma:
        return [*flags, "-ffp-contract=off"]
    # At -O1 the second is what lets the first do anything.
    flags += ["-ffp-contract=fast", "-fexpensive-optimizations"]
    return [*flags, "-mfma"] if platform.machine() == "x86_64" else flags


def build_kernel(name: str, translation_unit: str, text: str, options: Options) -> tuple[Path, float]:
    """The shared library of a kernel and the seconds that it took to build; MetalCompileError shows lines of `text`."""
    flags = _kernel_flags(options)
    library = _library_path("kernel", translation_unit, *flags)
    if library.exists():
        return library, 0.0
    started = time.perf_counter()
    handle, source_name = tempfile.mkstemp(prefix=library.stem, suffix=".cpp", dir=library.parent)
    with os.fdopen(handle, "w") as file:
        file.write(translation_unit)
    source = Path(source_name)
    try:
        words = _compile(library, flags, [source])
    finally:
        source.unlink()
    if words is not None:
        raise MetalCompileError(name, _compile_findings(words), text)
    return library, time.perf_counter() - started


@cache
def load_kernel(library: Path) -> ctypes.CDLL:
    runtime()
    return ctypes.CDLL(str(library))


def line_of(library: Path, address: int) -> int | None:
    """The line of the kernel's text that holds the code at `address` in the library, through inlined functions."""
    if not shutil.which("addr2line"):
        return None
    command = ["addr2line", "-i", "-e", str(library), hex(address)]
    frames = subprocess.run(command, capture_output=True, text=True).stdout
    found = re.search(rf"(?:^|/){re.escape(KERNEL_FILE)}:(\d+)", frames, re.MULTILINE)
    return int(found[1]) if found else None
