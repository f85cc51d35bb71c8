"""The cache of compiled kernels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import metal_emulator
from tests.metal_emulator.launches import COPY, arange, run

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def emulator():
    metal_emulator.require()


def test_kernel_is_built_once(tmp_path, monkeypatch):
    monkeypatch.setenv("METAL_EMULATOR_CACHE", str(tmp_path))
    with metal_emulator.recording() as runs:
        for _ in range(2):
            run(COPY, [arange(9)])
    assert runs[0].compile_s > 0 == runs[1].compile_s
    assert [path.suffix for path in tmp_path.iterdir()] == [".so"]


def test_two_processes_may_build_at_once_in_any_folder(tmp_path):
    (tmp_path / "metal_stdlib").write_text("#error not this one\n")
    (tmp_path / "kernel.metal").write_text("#error not this one\n")
    program = (
        "import mlx.core as mx; from tests.metal_emulator import metal_kernel; "
        "k = metal_kernel('n', [], ['o'], 'o[thread_position_in_grid.x] = 7;'); "
        "print(k(inputs=[], grid=(1, 1, 1), threadgroup=(1, 1, 1), output_shapes=[(1,)], "
        "output_dtypes=[mx.int32])[0].item())"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "METAL_EMULATOR_CACHE": str(tmp_path / "cache")}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    assert [process.communicate(timeout=60)[0] for process in processes] == ["7\n", "7\n"]
