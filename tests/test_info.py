"""`python -m qwen_mlx.info`: what it tells of the demo model and of others, as a table and as JSON."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from qwen_mlx import info
from qwen_mlx.cli import run
from qwen_mlx.hub import resolve
from qwen_mlx.info import describe
from qwen_mlx.load import load_model
from tests.layouts import mlx_layout, released, write

DEMO = resolve("demo")


@pytest.fixture
def folder_of(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """`folder_of(variant, change)`: a checkpoint with a tokenizer, and `change` in its text_config."""

    def folder(variant: str, **change: Any) -> Path:
        copy = tmp_path / variant
        shutil.copytree(checkpoint_of(variant), copy)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(DEMO / name, copy)
        raw = json.loads((copy / "config.json").read_text())
        raw["text_config"] |= change
        (copy / "config.json").write_text(json.dumps(raw))
        return copy

    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", ["c-r3-d128", "d-moe"])
def test_parameters_and_bytes_are_those_of_the_loaded_model(
    variant: str, dtype: str, folder_of: Callable[..., Path]
) -> None:
    folder = folder_of(variant)
    found, model = describe(folder, dtype=dtype), load_model(folder, dtype=dtype)
    arrays = [array for _, array in tree_flatten(model.parameters())]
    assert found["parameters"] == sum(array.size for array in arrays)
    assert found["memory"][0]["weights"] == sum(array.nbytes for array in arrays)
    assert found["dtype"] == {"value": dtype, "why": "asked for"}


def test_a_quantized_folder(folder_of: Callable[..., Path], tmp_path: Path) -> None:
    source, tensors = folder_of("a-r1-d32"), {}
    for name, array in mlx_layout(released(source)).items():
        if name.endswith("_proj.weight"):
            parts = mx.quantize(array, 64, 4)
            tensors |= {
                name.replace("weight", part): values for part, values in zip(("weight", "scales", "biases"), parts)
            }
        else:
            tensors[name] = array
    folder = write(tmp_path / "quantized", source, tensors)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, folder)
    found = describe(folder, dtype="bfloat16")
    weights = sum(array.nbytes for _, array in tree_flatten(load_model(folder, dtype="bfloat16").parameters()))
    assert (found["layout"], found["quantization"]) == ("MLX", "4 bit by 64, affine")
    assert found["parameters"] == describe(source)["parameters"]
    assert found["memory"][0]["weights"] == weights
    assert (found["mtp_head"], describe(source)["mtp_head"]) == (False, True)


def test_no_weight_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx, "load", None)
    before = mx.get_active_memory()
    assert describe(DEMO)["layout"] == "released"
    assert mx.get_active_memory() == before


def test_sampling_tells_where_each_value_is_from(folder_of: Callable[..., Path]) -> None:
    found = describe(folder_of("a-r1-d32"))["sampling"]
    file, card = "generation_config.json", "model card"
    assert found["answering"] == {
        "temperature": {"value": 1.0, "from": file},
        "top_p": {"value": 0.95, "from": file},
        "top_k": {"value": 20, "from": file},
        "presence_penalty": {"value": 2.0, "from": card},
    }
    assert found["thinking"]["presence_penalty"] == {"value": 1.5, "from": card}
    assert describe(DEMO)["sampling"]["thinking"] == {"temperature": {"value": 0.0, "from": file}}


def test_yarn_is_told(folder_of: Callable[..., Path]) -> None:
    rope = {"mrope_section": [3, 3, 2], "partial_rotary_factor": 0.25, "rope_theta": 1e7, "rope_type": "yarn"}
    folder = folder_of("a-r1-d32", rope_parameters=rope | {"factor": 4.0, "original_max_position_embeddings": 4096})
    found = describe(folder)
    assert found["context_length"] == 16384
    assert found["yarn"]["factor"] == 4
    assert "context       16,384 tokens, by YaRN of 4,096" in info._lines("x", found)


@pytest.mark.parametrize(("generation", "dtype"), [(None, "float32"), (13, "float16"), (15, "bfloat16")])
def test_dtype_and_kernels_of_a_machine(
    generation: int | None, dtype: str, folder_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(info, "gpu_generation", lambda: generation)
    monkeypatch.setattr("qwen_mlx.kernels.backend.gpu_generation", lambda: generation)
    monkeypatch.setattr(info, "memory_limit", lambda: 10**9)
    found = describe(folder_of("c-r3-d128"))
    assert found["dtype"]["value"] == dtype
    assert ("qk_norm_rope" in found["kernels"], "gated_delta_step" in found["kernels"]) == (bool(generation),) * 2
    assert (found["kernels"] == []) == (generation is None)


def test_a_length_that_does_not_fit_is_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "memory_limit", lambda: 200_000_000)
    found = describe(DEMO, lengths=[4096, 262144])
    assert [plan["fits"] for plan in found["memory"]] == [True, False]
    assert [line.endswith("does not fit") for line in info._lines("demo", found)[-2:]] == [False, True]


def test_the_table_and_the_json_tell_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(lambda: info.main(["demo", "--lengths", "1000", "--kv-bits", "8", "--json"])) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["model"], told["memory"][0]["tokens"], told["memory"][0]["kv_bits"]) == ("demo", 1000, 8)
    assert run(lambda: info.main(["demo", "--lengths", "1000", "--kv-bits", "8"])) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert f"{told['parameters']:,} of the text model" in out
    assert told["architecture"] in out
    assert "temperature 0 (generation_config.json)" in out
    assert out.splitlines()[-1].split()[0] == "1,000"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["./nowhere"], "./nowhere is no folder here"),
        (["demo", "--lengths", "0"], "must be an integer, at least 1"),
        (["demo", "--kv-bits", "5"], "--kv-bits"),
    ],
)
def test_bad_input_is_one_sentence(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = run(lambda: info.main(arguments))
    except SystemExit as end:
        code = int(str(end.code))
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n"), said in err) == (2, "", 1, True)


def test_a_wrong_recommendation_is_told(folder_of: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_of("a-r1-d32")
    (folder / "generation_config.json").write_text('{"temperature": "warm"}')
    assert run(lambda: info.main([str(folder)])) == 2
    assert "generation_config.json: temperature must be" in capsys.readouterr().err
