"""Whether the emulator can run here.

Out: nothing, a skipped test, or under CI a failed one: a check that never runs in CI is no check.
"""

import os
import platform
import shutil
import sys
from importlib.util import find_spec

import pytest

from tests.metal_emulator.build import COMPILER

MACHINES = ("x86_64", "aarch64")


def missing() -> str | None:
    """What is not installed, with the command that installs it; None if all is there."""
    if shutil.which(COMPILER) is None:
        return f"the Metal emulator needs {COMPILER}: apt-get install {COMPILER}"
    if find_spec("clang") is None:
        return "the Metal emulator needs libclang: pip install libclang"
    return None


def require() -> None:
    """Skips the test where the emulator cannot run. Where CI is set, what is only not installed fails it."""
    if sys.platform != "linux" or platform.machine() not in MACHINES:
        pytest.skip(f"the Metal emulator runs on Linux, on {' and '.join(MACHINES)}")
    reason = missing()
    if reason is None:
        return
    if os.environ.get("CI"):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)
