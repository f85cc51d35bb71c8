"""A folder to a model: its numbers' kinds, its quantization, and how little is read on the way."""

import importlib
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from qwen_mlx.errors import CheckpointError
from qwen_mlx.kernels.backend import read_generation
from qwen_mlx.load import DTYPES, auto_dtype, load, load_model, weights_with_nan
from qwen_mlx.model.qwen import Qwen
from tests.golden.checkpoints import Variant, config, shapes
from tests.golden.compare import TOLERANCE
from tests.layouts import Tensors, mlx_layout, mlx_name, released, write

# The package's `load` is the function; this is the module of that name.
LOAD = importlib.import_module("qwen_mlx.load")
TOKENS = mx.array(np.random.RandomState(7).randint(0, 352, (1, 24)))
TIED, UNTIED, MOE = "a-r1-d32", "f-k32-v64", "d-moe"
CheckpointOf = Callable[[str], Path]
EMBEDDING = "model.language_model.embed_tokens.weight"
ALWAYS_FLOAT32 = ("norm.weight", "linear_attn.A_log", "linear_attn.dt_bias")


def weights(model: Qwen) -> Tensors:
    return dict(tree_flatten(model.parameters()))


def logits(folder: Path) -> np.ndarray:
    return np.array(load_model(folder, dtype="float32")(TOKENS))


def worst(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max())


@pytest.mark.parametrize("dtype", DTYPES)
def test_gains_and_gates_stay_float32(dtype: str, checkpoint_of: CheckpointOf) -> None:
    kinds = {n: a.dtype for n, a in weights(load_model(checkpoint_of(TIED), dtype=dtype)).items()}
    assert {n for n, kind in kinds.items() if n.endswith(ALWAYS_FLOAT32) and kind != mx.float32} == set()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_other_weight_has_the_dtype(dtype: str, checkpoint_of: CheckpointOf) -> None:
    kinds = {n: a.dtype for n, a in weights(load_model(checkpoint_of(MOE), dtype=dtype)).items()}
    assert {kind for n, kind in kinds.items() if not n.endswith(ALWAYS_FLOAT32)} == {DTYPES[dtype]}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", [TIED, UNTIED, MOE])
def test_activations_have_the_dtype(variant: str, dtype: str, checkpoint_of: CheckpointOf) -> None:
    model = load_model(checkpoint_of(variant), dtype=dtype)
    hidden = model.hidden(model.embed(TOKENS), model.make_cache())
    assert (hidden.dtype, model.logits(hidden).dtype) == (DTYPES[dtype], DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_state_is_float32(dtype: str, checkpoint_of: CheckpointOf) -> None:
    model = load_model(checkpoint_of(TIED), dtype=dtype)
    cache = model.make_cache()
    model(TOKENS, cache)
    assert cache.layers[0].recurrent_state.dtype == mx.float32


@pytest.mark.parametrize(
    ("generation", "dtype"), [(None, "float32"), (13, "float16"), (14, "float16"), (15, "bfloat16"), (16, "bfloat16")]
)
def test_auto(generation: int | None, dtype: str) -> None:
    assert auto_dtype(generation) == dtype


@pytest.mark.parametrize(
    ("architecture", "generation"),
    [("applegpu_g13g", 13), ("applegpu_g14d", 14), ("applegpu_g16p_2", 16), ("Apple Paravirtual device", 13)],
)
def test_the_generation_is_read_from_the_name(architecture: str, generation: int) -> None:
    assert read_generation(architecture) == generation


@pytest.mark.parametrize("generation", [None, 13, 15])
def test_auto_asks_the_machine(
    generation: int | None, checkpoint_of: CheckpointOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LOAD, "gpu_generation", lambda: generation)
    assert load_model(checkpoint_of(TIED)).dtype == DTYPES[auto_dtype(generation)]


def test_an_unknown_dtype(checkpoint_of: CheckpointOf) -> None:
    with pytest.raises(ValueError, match="dtype must be auto, float32, bfloat16, float16, not 'int8'"):
        load_model(checkpoint_of(TIED), dtype="int8")


def large(folder: Path, source: Path, name: str = EMBEDDING) -> Path:
    """One value of `name` beyond what float16 can hold."""
    tensors = released(source)
    flat = tensors[name].astype(mx.float32).flatten()
    tensors[name] = mx.concatenate([mx.array([70000.0]), flat[1:]]).reshape(tensors[name].shape).astype(mx.bfloat16)
    return write(folder, source, tensors)


def test_float16_refuses_what_it_cannot_hold(checkpoint_of: CheckpointOf, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"does not fit float16: model.embed_tokens.weight exceed.*use bfloat16"):
        load_model(large(tmp_path, checkpoint_of(TIED)), dtype="float16")


def test_auto_falls_back_to_bfloat16(
    checkpoint_of: CheckpointOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LOAD, "gpu_generation", lambda: 13)
    with pytest.warns(UserWarning, match=r"model.embed_tokens.weight exceed float16's 65504; running in bfloat16"):
        model = load_model(large(tmp_path, checkpoint_of(TIED)))
    assert model.dtype == mx.bfloat16


def test_what_stays_float32_may_be_large(checkpoint_of: CheckpointOf, tmp_path: Path) -> None:
    folder = large(tmp_path, checkpoint_of(TIED), "model.language_model.norm.weight")
    assert load_model(folder, dtype="float16").dtype == mx.float16


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_named(value: float, checkpoint_of: CheckpointOf, tmp_path: Path) -> None:
    source = checkpoint_of(TIED)
    tensors = released(source)
    tensors["model.language_model.norm.weight"] = mx.full((128,), value)
    model = load_model(write(tmp_path, source, tensors))
    assert weights_with_nan(model) == ["model.norm.weight"]


@pytest.mark.parametrize("variant", [TIED, MOE])
def test_sound_weights_are_not_named(variant: str, checkpoint_of: CheckpointOf) -> None:
    assert weights_with_nan(load_model(checkpoint_of(variant))) == []


def quantized(tensors: Tensors, mode: str, group_size: int, bits: int) -> tuple[Tensors, Tensors]:
    """The MLX layout with all the matrices that can be quantized so; and the same model with these multiplied out."""
    packed, plain = {}, {}
    for name, array in mlx_layout(tensors).items():
        if array.ndim < 2 or name.endswith("conv1d.weight") or array.shape[-1] % group_size:
            packed[name] = plain[name] = array
            continue
        weight, scales, *biases = mx.quantize(array, group_size, bits, mode=mode)
        path = name.removesuffix("weight")
        packed |= {name: weight, path + "scales": scales} | ({path + "biases": biases[0]} if biases else {})
        # In float32: multiplied out in bfloat16, the values would be rounded once more.
        wide = [a.astype(mx.float32) for a in (scales, *biases)] if biases else [scales]
        plain[name] = mx.dequantize(weight, *wide, group_size=group_size, bits=bits, mode=mode, dtype=mx.float32)
    return packed, plain


FORMS = [("affine", 64, bits) for bits in (2, 3, 4, 5, 6, 8)]
FORMS += [("affine", 32, 4), ("affine", 128, 4), ("affine", 32, 8), ("affine", 128, 3)]
FORMS += [("mxfp4", 32, 4), ("mxfp8", 32, 8), ("nvfp4", 16, 4)]


@pytest.mark.parametrize(("mode", "group_size", "bits"), FORMS)
@pytest.mark.parametrize("variant", [TIED, MOE])
def test_quantized_is_the_model_multiplied_out(
    variant: str, mode: str, group_size: int, bits: int, checkpoint_of: CheckpointOf, tmp_path: Path
) -> None:
    source = checkpoint_of(variant)
    packed, plain = quantized(released(source), mode, group_size, bits)
    ours = logits(write(tmp_path / "packed", source, packed))
    assert worst(ours, logits(write(tmp_path / "plain", source, plain))) < TOLERANCE


@pytest.mark.parametrize(("mode", "group_size", "bits"), FORMS)
def test_the_form_is_read_off_the_tensors(
    mode: str, group_size: int, bits: int, checkpoint_of: CheckpointOf, tmp_path: Path
) -> None:
    source = checkpoint_of(TIED)
    packed, _ = quantized(released(source), mode, group_size, bits)
    embedding = load_model(write(tmp_path, source, packed)).model.embed_tokens
    assert isinstance(embedding, nn.QuantizedEmbedding)
    assert (embedding.mode, embedding.group_size, embedding.bits) == (mode, group_size, bits)


def test_forms_may_differ_from_layer_to_layer(checkpoint_of: CheckpointOf, tmp_path: Path) -> None:
    source = checkpoint_of(TIED)
    packed, plain = quantized(released(source), "affine", 64, 4)
    other_packed, other_plain = quantized(released(source), "mxfp8", 32, 8)
    path = mlx_name("model.language_model.layers.0.linear_attn.out_proj.")
    for mixed, other in ((packed, other_packed), (plain, other_plain)):
        for name in [n for n in mixed if n.startswith(path)]:
            del mixed[name]
        mixed |= {n: a for n, a in other.items() if n.startswith(path)}
    ours = logits(write(tmp_path / "packed", source, packed))
    assert worst(ours, logits(write(tmp_path / "plain", source, plain))) < TOLERANCE


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_quantized_model_has_the_dtype(dtype: str, checkpoint_of: CheckpointOf, tmp_path: Path) -> None:
    source = checkpoint_of(TIED)
    packed, _ = quantized(released(source), "affine", 64, 4)
    assert load_model(write(tmp_path, source, packed), dtype=dtype)(TOKENS).dtype == DTYPES[dtype]


def without_biases(packed: Tensors, path: str) -> None:
    del packed[path + "biases"]


def halved(packed: Tensors, path: str) -> None:
    packed[path + "weight"] = packed[path + "weight"][:, :-1]


def without_scales(packed: Tensors, path: str) -> None:
    del packed[path + "scales"]


def float_codes(packed: Tensors, path: str) -> None:
    packed[path + "weight"] = packed[path + "weight"].astype(mx.float32)


def few_groups(packed: Tensors, path: str) -> None:
    for name in ("scales", "biases"):
        packed[path + name] = packed[path + name][:, :1]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (without_biases, "MLX does not know: 4 bits in groups of 64, without biases"),
        (without_scales, "holds tensors that its config.json does not speak of: model.layers.0.mlp.down_proj.biases"),
        (halved, "model.layers.0.mlp.down_proj is quantized in a way MLX does not know: 3 bits"),
        (few_groups, "MLX does not know: 4 bits in groups of 192, with biases"),
        (float_codes, "model.layers.0.mlp.down_proj.weight is stored as mlx.core.float32, where mlx.core.uint32"),
    ],
)
def test_quantization_that_mlx_does_not_know(
    spoil: Callable[[Tensors, str], None], said: str, checkpoint_of: CheckpointOf, tmp_path: Path
) -> None:
    source = checkpoint_of(TIED)
    packed, _ = quantized(released(source), "affine", 64, 4)
    spoil(packed, "language_model.model.layers.0.mlp.down_proj.")
    with pytest.raises(CheckpointError, match=said):
        load_model(write(tmp_path, source, packed))


@pytest.fixture(scope="module")
def mlx_lm() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        utils = pytest.importorskip("mlx_lm.utils")
        pytest.importorskip("mlx_lm.models.qwen3_5_moe")
    return utils


def four_or_eight(path: str, module: nn.Module) -> bool | dict[str, Any]:
    """Per-layer overrides: out_proj in 8 bits, the gates' projections not at all."""
    if path.endswith("out_proj"):
        return {"group_size": 32, "bits": 8, "mode": "affine"}
    return not path.endswith(("in_proj_a", "in_proj_b"))


CONVERSIONS: dict[str, dict[str, Any] | None] = {
    "float": None,
    "4 bits": {"group_size": 64, "bits": 4},
    "8 bits": {"group_size": 64, "bits": 8},
    "per layer": {"group_size": 64, "bits": 4, "quant_predicate": four_or_eight},
    "mxfp4": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
    "mxfp8": {"group_size": 32, "bits": 8, "mode": "mxfp8"},
    "nvfp4": {"group_size": 16, "bits": 4, "mode": "nvfp4"},
}


@pytest.mark.parametrize("conversion", CONVERSIONS)
@pytest.mark.parametrize("variant", [TIED, MOE])
def test_a_conversion_by_mlx_lm(
    variant: str, conversion: str, checkpoint_of: CheckpointOf, tmp_path: Path, mlx_lm: Any
) -> None:
    settings = CONVERSIONS[conversion]
    model, raw = mlx_lm.load_model(checkpoint_of(variant))
    if settings is not None:
        model, raw = mlx_lm.quantize_model(model, raw, **settings)
    mlx_lm.save_model(tmp_path, model)
    mlx_lm.save_config(raw, tmp_path / "config.json")
    theirs, _ = mlx_lm.load_model(tmp_path)
    theirs.set_dtype(mx.float32)
    assert worst(logits(tmp_path), np.array(theirs(TOKENS))) < TOLERANCE


BIG = Variant(1, 1024, (8, 2, 256), (16, 16, 128, 128), (11, 11, 10), tied=True, layers=24, intermediate=3584)


def hollow(folder: Path, sizes: Variant, tensors: dict[str, tuple[int, ...]], prefix: str = "") -> Path:
    """A checkpoint of zeros in bfloat16 whose data are a hole in the file: large, and written at once."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config(sizes)))
    header, end = {}, 0
    for name, shape in tensors.items():
        start, end = end, end + 2 * int(np.prod(shape))
        header[prefix + name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path = folder / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with path.open("r+b") as file:
        file.truncate(8 + len(text) + end)
    return folder


def bytes_read() -> int:
    """What this process has read from files so far, however it asked for it."""
    if not sys.platform.startswith("linux"):
        pytest.skip("only Linux counts the bytes that a process reads")
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A gigabyte of the shape of the 0.8B model, but for the vocabulary."""
    folder = hollow(tmp_path_factory.mktemp("big"), BIG, shapes(BIG))
    return SimpleNamespace(folder=folder, size=(folder / "model.safetensors").stat().st_size)


def test_loading_reads_headers_and_gains_only(big: SimpleNamespace) -> None:
    before = bytes_read()
    load_model(big.folder, dtype="bfloat16")
    assert (big.size > 900e6, bytes_read() - before < 1e6) == (True, True)


def test_loading_holds_next_to_nothing_in_memory(big: SimpleNamespace) -> None:
    before = mx.get_active_memory()
    model = load_model(big.folder, dtype="bfloat16")
    assert mx.get_active_memory() - before < 2e6
    del model


def test_a_layer_is_read_when_it_is_used(big: SimpleNamespace) -> None:
    model = load_model(big.folder, dtype="bfloat16")
    before = bytes_read()
    mx.eval(model.model.layers[3].self_attn.o_proj(mx.zeros((1, 1, 2048), mx.bfloat16)))
    assert 1024 * 2048 * 2 <= bytes_read() - before < 1.2 * 1024 * 2048 * 2


@pytest.mark.parametrize("other", ["model.visual.blocks.0.attn.qkv.weight", "mtp.fc.weight", "vision_tower.merger.w"])
def test_vision_and_draft_tensors_are_never_read(other: str, tmp_path: Path) -> None:
    small = Variant(1, 64, (2, 1, 64), (2, 2, 32, 32), (3, 3, 2), tied=True, intermediate=64)
    text = {name: shape for name, shape in shapes(small).items() if not name.startswith("mtp.")}
    folder = hollow(tmp_path, small, {other: (8192, 8192), **text})
    before = bytes_read()
    mx.eval(load_model(folder, dtype="float32")(TOKENS))
    assert bytes_read() - before < 8e6


def test_a_model_and_its_tokenizer() -> None:
    model, tokenizer = load("demo")
    tokens = tokenizer.encode("Once upon a time")
    assert model(mx.array([tokens])).shape == (1, len(tokens), model.config.text.vocab_size)
