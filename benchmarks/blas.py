"""The BLAS that MLX computes with on Linux. The one in its wheel is about ten times slower than OpenBLAS.

OpenBLAS has to choose its kernels by itself: where OPENBLAS_CORETYPE is set to an older processor, it lacks the ones
for small matrices that make a decoded token fast (qwen_mlx/model/linear.py).
"""

import ctypes
import os
import sys
from typing import Any


def preload(name: str = "libopenblas.so.0") -> dict[str, Any]:
    """Load that BLAS in place of the wheel's, which works only before MLX is imported; what a report says of it.

    "wheel" keeps the one MLX brings, as does a system without OpenBLAS (`apt-get install libopenblas0-pthread`).
    """
    core = None
    if name != "wheel" and sys.platform == "linux":
        try:
            core = _core(ctypes.CDLL(name, ctypes.RTLD_GLOBAL))
        except OSError:
            print(f"{name} is not there: measured with the slow BLAS of MLX's wheel", file=sys.stderr)
            name = "wheel"
    return {"blas": name, "blas_core": core, "openblas_coretype": os.environ.get("OPENBLAS_CORETYPE")}


def _core(library: ctypes.CDLL) -> str | None:
    """The processor whose kernels OpenBLAS runs; None of another BLAS."""
    if not hasattr(library, "openblas_get_corename"):
        return None
    library.openblas_get_corename.restype = ctypes.c_char_p
    return library.openblas_get_corename().decode()
