"""Learned quantization: scales and biases tuned until the result foretells what its source does, by mlx-lm's DWQ.

It trains through mlx-lm's model of the written folder, since our kernels have no gradients; the teacher is ours.
"""

import shutil
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

import mlx.core as mx

from qwen_mlx.checkpoint import load_file
from qwen_mlx.convert.folder import TUNED
from qwen_mlx.convert.opened import Opened
from qwen_mlx.errors import ConversionError
from qwen_mlx.load import DTYPES, parameters

SAMPLES = 1024  # windows in all; a shorter text is read again
BATCH = 4
LEARNING_RATE = 1e-6  # mlx-lm's own
SHARDS, COMPLETE = "tuned", "complete"


def tune(
    folder: Path,
    opened: Opened,
    windows: Sequence[mx.array],
    dtype: str,
    *,
    samples: int = SAMPLES,
    learning_rate: float = LEARNING_RATE,
) -> None:
    """Replace scales and biases in the shards of `folder`, once. Both models are in memory meanwhile.

    Raises `ConversionError` where nothing can be learned: no affine form of less than 8 bits, or too short a text.
    """
    if (folder / TUNED).exists():
        return
    if (folder / SHARDS / COMPLETE).exists():  # an earlier run broke off while it moved them
        return _move(folder)
    from mlx.optimizers import Adam
    from mlx_lm.quant.dwq import dwq_quantize
    from mlx_lm.utils import load_model as load_peer

    whole = [window for window in windows if window.size == windows[0].size]
    if len(whole) < BATCH:
        raise ConversionError(
            f"--dwq learns from {BATCH} windows of {windows[0].size} tokens at least, the text has {len(whole)}; give "
            "a longer one with --text."
        )
    student, _ = load_peer(folder, lazy=True)
    learners = [m for _, m in student.named_modules() if getattr(m, "mode", "") == "affine" and m.bits < 8]
    if not learners:
        raise ConversionError("--dwq tunes affine forms of less than 8 bits, and there are none; leave it out.")
    teacher = opened.loaded(DTYPES[dtype])
    data = [(window.tolist(), 0) for window in whole]
    validation, learned = (data[:BATCH], data[BATCH:]) if len(data) >= 2 * BATCH else (data[:BATCH], data)
    repeated = [learned[i % len(learned)] for i in range(max(samples, len(learned)))]
    with redirect_stdout(sys.stderr):
        dwq_quantize(
            student,
            lambda batch, *_, **__: teacher(batch),
            Adam(learning_rate=learning_rate, bias_correction=True),
            repeated,
            validation,
            BATCH,
            windows[0].size,
            seed=0,
            dtype=DTYPES[dtype],
        )
    found = parameters(student)
    _write(folder, {name: array for name, array in found.items() if name.endswith(("scales", "biases"))})
    _move(folder)


def _write(folder: Path, learned: dict[str, mx.array]) -> None:
    """The shards once more, with what was learned, beside those there are."""
    tuned = folder / SHARDS
    shutil.rmtree(tuned, ignore_errors=True)
    tuned.mkdir()
    for shard in sorted(folder.glob("model*.safetensors")):
        tensors = load_file(shard)
        tensors |= {name: learned[name] for name in tensors.keys() & learned.keys()}
        mx.save_safetensors(str(tuned / shard.name), tensors, {"format": "mlx"})
    (tuned / COMPLETE).touch()


def _move(folder: Path) -> None:
    """Let complete shards take the place of those they were made of."""
    for shard in (folder / SHARDS).glob("*.safetensors"):
        shard.replace(folder / shard.name)
    (folder / TUNED).touch()
    shutil.rmtree(folder / SHARDS)
