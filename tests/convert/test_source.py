"""Rows of every kind of checkpoint, under our names: the released form is what all others must come back to."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from qwen_mlx.checkpoint import open_checkpoint
from qwen_mlx.config import read_json
from qwen_mlx.convert.opened import open_model
from qwen_mlx.convert.source import Source, open_source
from qwen_mlx.errors import CheckpointError, ConversionError
from qwen_mlx.load_mtp import find_mtp
from tests.golden.checkpoints import VARIANTS
from tests.layouts import Tensors, mlx_layout, released, write

CheckpointOf = Callable[[str], Path]


def source_of(folder: Path) -> Source:
    return open_source(folder, read_json(folder / "config.json"))


def same(a: mx.array, b: mx.array) -> bool:
    return a.shape == b.shape and np.array_equal(np.array(a.astype(mx.float32)), np.array(b.astype(mx.float32)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_text_is_what_loading_reads(variant: str, checkpoint_of: CheckpointOf) -> None:
    folder = checkpoint_of(variant)
    source, loaded = source_of(folder), open_checkpoint(folder).tensors()
    assert source.kind == "released"
    assert source.text.keys() == loaded.keys()
    assert all(same(source.text[name].all(), array) for name, array in loaded.items())


@pytest.mark.parametrize("variant", VARIANTS)
def test_draft_head_is_what_loading_reads(variant: str, checkpoint_of: CheckpointOf) -> None:
    found = find_mtp(checkpoint_of(variant))
    assert found is not None
    source, loaded = source_of(checkpoint_of(variant)), found.tensors()
    assert source.mtp.keys() == loaded.keys()
    assert all(same(source.mtp[name].all(), array) for name, array in loaded.items())


def test_rows_are_the_part_that_was_asked_for(checkpoint_of: CheckpointOf) -> None:
    for tensor in source_of(checkpoint_of("d-moe")).text.values():
        middle = tensor.shape[0] // 2
        assert same(tensor.rows(1, middle + 1), tensor.all()[1 : middle + 1])


def test_experts_one_by_one_are_those_in_one_tensor(checkpoint_of: CheckpointOf, tmp_path: Path) -> None:
    tensors = released(checkpoint_of("d-moe"))
    for name in [name for name in tensors if ".experts." in name]:
        stacked, prefix = tensors.pop(name), name.rpartition(".")[0]
        for i in range(stacked.shape[0]):
            parts = {"gate_proj": stacked[i, :64], "up_proj": stacked[i, 64:]}
            parts = parts if name.endswith("gate_up_proj") else {"down_proj": stacked[i]}
            tensors |= {f"{prefix}.{i}.{kind}.weight": part for kind, part in parts.items()}
    apart = source_of(write(tmp_path, checkpoint_of("d-moe"), tensors))
    whole = source_of(checkpoint_of("d-moe"))
    for ours, theirs in (apart.text, whole.text), (apart.mtp, whole.mtp):
        assert ours.keys() == theirs.keys()
        assert all(same(ours[name].all(), theirs[name].all()) for name in theirs)


def fp8(tensors: Tensors) -> Tensors:
    """As Qwen's FP8 releases: every projection but the gates' as E4M3, a scale for each block of 128 x 128."""
    found: Tensors = {}
    for name, array in tensors.items():
        if not name.endswith("_proj.weight") and not name.endswith(("in_proj_qkv.weight", "in_proj_z.weight")):
            found[name] = array
            continue
        wide = np.array(array.astype(mx.float32)).astype(np.float64)
        N, K = wide.shape
        blocks = np.pad(wide, ((0, -N % 128), (0, -K % 128))).reshape(-(-N // 128), 128, -(-K // 128), 128)
        scales = np.abs(blocks).max((1, 3)) / 448
        scaled = wide / scales.repeat(128, 0).repeat(128, 1)[:N, :K]
        found[name] = mx.to_fp8(mx.array(scaled.astype(np.float32)))
        found[name + "_scale_inv"] = mx.array(scales.astype(np.float32)).astype(mx.bfloat16)
    return found


def write_fp8(folder: Path, source: Path, tensors: Tensors) -> Path:
    """A folder as `write` makes it, whose uint8 tensors are said to be E4M3."""
    write(folder, source, tensors)
    file = folder / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].replace(b'"U8"', b'"F8_E4M3"')
    file.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def e4m3(bits: np.ndarray) -> np.ndarray:
    """By the definition of the format: sign, four bits of exponent with bias 7, three of mantissa; no infinity."""
    sign, exponent, mantissa = bits >> 7, (bits >> 3) & 15, bits & 7
    size = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent.astype(int) - 7))
    return np.where(sign, -size, size)


@pytest.mark.parametrize("variant", ["b-r2-d64", "c-r3-d128"])
def test_fp8_times_its_blocks_scales(variant: str, checkpoint_of: CheckpointOf, tmp_path: Path) -> None:
    tensors = fp8(released(checkpoint_of(variant)))
    opened = open_model(write_fp8(tmp_path, checkpoint_of(variant), tensors))
    assert (opened.source.kind, opened.quantized) == ("FP8", False)
    count = 0
    for name, scales in tensors.items():
        if not name.endswith("_scale_inv") or name.startswith("mtp."):
            continue
        stored = name.removesuffix("_scale_inv")
        found = opened.source.text[stored.replace("model.language_model.", "model.")]
        wide = np.array(scales.astype(mx.float32)).astype(np.float64).repeat(128, 0).repeat(128, 1)
        wanted = e4m3(np.array(tensors[stored])) * wide[: found.shape[0], : found.shape[1]]
        assert np.array_equal(np.array(found.all()), wanted.astype(np.float32))
        assert np.array_equal(np.array(found.rows(65, 128)), wanted[65:128].astype(np.float32))
        count += 1
    assert count > 20
    assert opened.source.mtp["fc.weight"].dtype == mx.bfloat16
    assert opened.source.mtp["layers.0.mlp.up_proj.weight"].dtype == mx.float32


def test_vision_tower_is_in_the_layout_of_mlx(checkpoint_of: CheckpointOf, tmp_path: Path) -> None:
    patches = mx.random.normal((4, 3, 2, 8, 8)).astype(mx.bfloat16)
    for prefix in ("model.visual.", "model.language_model.visual.", "visual."):
        tensors = released(checkpoint_of("a-r1-d32"))
        tensors |= {f"{prefix}patch_embed.proj.weight": patches, f"{prefix}blocks.0.norm1.bias": mx.ones(4)}
        source = source_of(write(tmp_path, checkpoint_of("a-r1-d32"), tensors))
        assert source.vision.keys() == {"vision_tower.patch_embed.proj.weight", "vision_tower.blocks.0.norm1.bias"}
        found = source.vision["vision_tower.patch_embed.proj.weight"]
        assert found.shape == (4, 2, 8, 8, 3)
        assert same(found.rows(1, 3), patches.transpose(0, 2, 3, 4, 1)[1:3])


def quantized_like_mlx_lm(tensors: Tensors, bits: int) -> Tensors:
    found: Tensors = {}
    for name, array in mlx_layout(tensors).items():
        if array.ndim < 2 or name.endswith("conv1d.weight"):
            found[name] = array
            continue
        parts = mx.quantize(array, 32, bits)
        found |= {name.removesuffix("weight") + kind: part for kind, part in zip(("weight", "scales", "biases"), parts)}
    return found


@pytest.mark.parametrize("variant", ["b-r2-d64", "d-moe"])
@pytest.mark.parametrize("bits", [4, 8])
def test_dequantized_rows(variant: str, bits: int, checkpoint_of: CheckpointOf, tmp_path: Path) -> None:
    tensors = quantized_like_mlx_lm(released(checkpoint_of(variant)), bits)
    folder = write(tmp_path, checkpoint_of(variant), tensors)
    opened = open_model(folder, dequantize=True)
    assert open_model(folder).quantized
    assert not opened.quantized
    for name in [name for name in tensors if name.endswith(".scales")]:
        path = name.removesuffix(".scales")
        packed, scales, biases = (np.array(tensors[f"{path}.{k}"].astype(t)) for k, t in
                                  (("weight", mx.uint32), ("scales", mx.float32), ("biases", mx.float32)))  # fmt: skip
        places = np.arange(packed.shape[-1] * 32 // bits)
        integers = (packed[..., places * bits // 32] >> (places * bits % 32)) & (2**bits - 1)
        wanted = integers * scales.repeat(32, -1).astype(np.float64) + biases.repeat(32, -1)
        found = opened.source.text[path.removeprefix("language_model.") + ".weight"]
        assert (
            np.abs(np.array(found.rows(len(wanted) - 1, len(wanted))) - wanted[-1:]).max() < 1e-6 * np.abs(wanted).max()
        )


def test_nothing_to_dequantize(checkpoint_of: CheckpointOf) -> None:
    with pytest.raises(ConversionError, match="is not quantized"):
        open_model(checkpoint_of("a-r1-d32"), dequantize=True)


def test_companions_are_known(tmp_path: Path, checkpoint_of: CheckpointOf) -> None:
    folder = shutil.copytree(checkpoint_of("a-r1-d32"), tmp_path / "model")
    for name in ("tokenizer.json", "LICENSE", "notes.txt"):
        (folder / name).write_text("x")
    assert source_of(folder).files.keys() == {"generation_config.json", "tokenizer.json", "LICENSE"}


def broken(change: Callable[[Tensors], object]) -> Callable[[Path, Path], Path]:
    def make(folder: Path, source: Path) -> Path:
        tensors = fp8(released(source))
        change(tensors)
        return write_fp8(folder, source, tensors)

    return make


UP = "model.language_model.layers.1.mlp.up_proj.weight"
NORM = "model.language_model.layers.1.linear_attn.norm.weight"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        pytest.param(broken(lambda t: t.pop(UP + "_scale_inv")), "is FP8 without _scale_inv", id="no_scale"),
        pytest.param(
            broken(lambda t: t.update({UP + "_scale_inv": mx.ones((9, 9))})), "needs a scale", id="scale_shape"
        ),
        pytest.param(broken(lambda t: t.update({NORM + "_scale_inv": mx.ones((1, 1))})), "scales no FP8", id="no_fp8"),
        pytest.param(broken(lambda t: t.update({NORM: mx.ones(128).astype(mx.int64)})), "stored as I64", id="dtype"),
    ],
)
def test_what_is_wrong_is_named(
    make: Callable[[Path, Path], Path], said: str, checkpoint_of: CheckpointOf, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=said):
        open_model(make(tmp_path, checkpoint_of("c-r3-d128")))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_rows_with_nan_name_file_and_tensor(
    value: float, dtype: mx.Dtype, checkpoint_of: CheckpointOf, tmp_path: Path
) -> None:
    tensors = {name: array.astype(dtype) for name, array in released(checkpoint_of("a-r1-d32")).items()}
    tensors[UP] = mx.where(mx.arange(tensors[UP].size).reshape(tensors[UP].shape) == 777, value, tensors[UP])
    source: Source = source_of(write(tmp_path, checkpoint_of("a-r1-d32"), tensors))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: model\.layers\.1\.mlp\.up_proj\.weight holds NaN"):
        source.text["model.layers.1.mlp.up_proj.weight"].all()
    assert source.text["model.layers.1.mlp.up_proj.weight"].rows(0, 2).size
