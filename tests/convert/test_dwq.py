"""Learned quantization brings the model nearer to its source, and changes nothing but scales and biases."""

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

from qwen_mlx.convert.dwq import tune
from qwen_mlx.convert.folder import Request, finish, write
from qwen_mlx.convert.forms import flat
from qwen_mlx.convert.opened import open_model
from qwen_mlx.convert.recipes import Form
from qwen_mlx.errors import ConversionError
from qwen_mlx.evaluation.models import compare
from qwen_mlx.load import load_model
from tests.convert.test_folder import equal, tensors_of

WINDOWS = [mx.random.randint(0, 352, (16,), key=mx.random.key(i)) for i in range(4)]
CheckpointOf = Callable[[str], Path]
# mlx-lm's imports warn of what its own dependencies have planned.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def divergence(folder: Path, source: Path) -> float:
    models = (load_model(path, dtype="float32") for path in (source, folder))
    return compare(*models, WINDOWS, vocab_size=368).kl_mean


def test_it_comes_nearer_to_its_source(checkpoint_of: CheckpointOf, tmp_path: Path) -> None:
    source, opened = checkpoint_of("e-k64-v32"), open_model(checkpoint_of("e-k64-v32"))
    request = Request(tmp_path / "model", "bfloat16", flat(Form(4, 64)), {}, shard=200_000)
    write(opened, request)
    before = {file.name: tensors_of(file) for file in request.partial.glob("model*.safetensors")}
    mx.eval(before)
    untuned = divergence(request.partial, source)
    tune(request.partial, opened, WINDOWS, "bfloat16", samples=24, learning_rate=1e-4)
    assert divergence(request.partial, source) < 0.97 * untuned
    changed = set()
    for name, tensors in before.items():
        after = tensors_of(request.partial / name)
        assert after.keys() == tensors.keys()
        changed |= {key.rpartition(".")[2] for key in after if not equal({"": after[key]}, {"": tensors[key]})}
    assert changed == {"scales", "biases"}
    once = {file.name: file.read_bytes() for file in request.partial.glob("model*.safetensors")}
    tune(request.partial, opened, WINDOWS, "bfloat16", samples=24, learning_rate=1e-4)  # done already
    assert once == {file.name: file.read_bytes() for file in request.partial.glob("model*.safetensors")}
    finish(request)
    assert not [path for path in (tmp_path / "model").iterdir() if "tuned" in path.name]


@pytest.mark.parametrize(
    ("form", "windows", "said"),
    [(Form(8), 4, "affine forms of less than 8 bits"), (Form(4), 3, "learns from 4 windows of 16 tokens")],
)
def test_where_nothing_can_be_learned(
    form: Form, windows: int, said: str, checkpoint_of: CheckpointOf, tmp_path: Path
) -> None:
    opened = open_model(checkpoint_of("e-k64-v32"))
    request = Request(tmp_path / "model", "bfloat16", flat(form), {})
    write(opened, request)
    with pytest.raises(ConversionError, match=said):
        tune(request.partial, opened, WINDOWS[:windows], "bfloat16")
