"""The BLAS that MLX computes with on Linux. The one in its wheel is about ten times slower than OpenBLAS.

OpenBLAS has to choose its kernels by itself: where OPENBLAS_CORETYPE is set to an older processor, it lacks the ones
for small matrices that make a decoded token fast (qwen_mlx/model/linear.py).
"""

import ctypes
import os
import sys
from typing import Any


def preload(name: str = "libopenblas.so.0", *, threads: int | None = None) -> dict[str, Any]:
    """Load that BLAS in place of the wheel's, which works only before MLX is imported; what a report says of it.

    With `threads` 1 it makes none of its own: they wait by spinning for some 20 ms, and on two cores slow down what
    MLX's and Python's threads do behind a matmul of several rows.

    "wheel" keeps the one MLX brings, as does a system without OpenBLAS (`apt-get install libopenblas0-pthread`).
    """
    core = None
    if threads is not None:
        os.environ["OPENBLAS_NUM_THREADS"] = str(threads)
    if name != "wheel" and sys.platform == "linux":
        try:
            core = _core(ctypes.CDLL(name, ctypes.RTLD_GLOBAL))
        except OSError:
            print(f"{name} is not there: measured with the slow BLAS of MLX's wheel", file=sys.stderr)
            name = "wheel"
    else:
        name = "as MLX has it"
    return {"blas": name, "blas_core": core, "openblas_coretype": os.environ.get("OPENBLAS_CORETYPE"),
            "openblas_threads": os.environ.get("OPENBLAS_NUM_THREADS")}  # fmt: skip


def _core(library: ctypes.CDLL) -> str | None:
    """The processor whose kernels OpenBLAS runs; None of another BLAS."""
    if not hasattr(library, "openblas_get_corename"):
        return None
    library.openblas_get_corename.restype = ctypes.c_char_p
    return library.openblas_get_corename().decode()
