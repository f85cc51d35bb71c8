"""Which checkpoint is this? Every layout gives the same model, and every broken folder one clear sentence."""

import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from qwen_mlx.checkpoint import open_checkpoint
from qwen_mlx.errors import CheckpointError
from qwen_mlx.load import load_model
from tests.golden.checkpoints import VARIANTS
from tests.layouts import Tensors, exact_gains, is_gain, mlx_layout, mlx_name, released, text_only, trunk, write

TOKENS = mx.array(np.random.RandomState(7).randint(0, 352, (1, 24)))
TIED, UNTIED, MOE = "a-r1-d32", "f-k32-v64", "d-moe"
CheckpointOf = Callable[[str], Path]
GAINS = "qwen_mlx/gains.safetensors"


def logits(folder: Path) -> np.ndarray:
    return np.array(load_model(folder, dtype="float32")(TOKENS))


def sharded(folder: Path, source: Path, tensors: Tensors, pattern: str, index: bool) -> Path:
    """`tensors` in two files, every other one in the second; with an index that lists them where `index`."""
    files = [pattern.format(i) for i in (1, 2)]
    for i, file in enumerate(files):
        write(folder, source, dict(list(tensors.items())[i::2]), file)
    if index:
        weight_map = {name: files[i % 2] for i, name in enumerate(tensors)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def ours(folder: Path, source: Path, tensors: Tensors) -> Path:
    """The qwen_mlx layout: as MLX has it, and the gains that were rounded there beside it."""
    write(folder, source, exact_gains(tensors), GAINS)
    return write(folder, source, mlx_layout(tensors))


def rounded(tensors: Tensors) -> Tensors:
    """The released layout with gains of which 1 + w is what a bfloat16 can hold."""

    def round_gain(w: mx.array) -> mx.array:
        return (1 + w.astype(mx.float32)).astype(mx.bfloat16).astype(mx.float32) - 1

    return {name: round_gain(array) if is_gain(name) else array for name, array in tensors.items()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_our_layout_is_exactly_the_released_one(variant: str, checkpoint_of: CheckpointOf, tmp_path: Path) -> None:
    source = checkpoint_of(variant)
    assert np.array_equal(logits(ours(tmp_path, source, released(source))), logits(source))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_mlx_layout_is_the_released_one_up_to_its_rounded_gains(
    variant: str, checkpoint_of: CheckpointOf, tmp_path: Path
) -> None:
    source = checkpoint_of(variant)
    tensors = released(source)
    converted = write(tmp_path / "mlx", source, mlx_layout(tensors))
    assert np.array_equal(logits(converted), logits(write(tmp_path / "rounded", source, rounded(tensors))))


@pytest.mark.parametrize(
    ("layout", "name"),
    [(released, "released"), (mlx_layout, "MLX"), (text_only, "released")],
    ids=["released", "mlx", "text only"],
)
def test_the_layout_is_told(
    layout: Callable[..., Tensors], name: str, checkpoint_of: CheckpointOf, tmp_path: Path
) -> None:
    source = checkpoint_of(TIED)
    tensors = released(source) if layout is released else layout(released(source))
    assert open_checkpoint(write(tmp_path, source, tensors)).layout == name


def test_our_layout_is_told_by_its_gains(checkpoint_of: CheckpointOf, tmp_path: Path) -> None:
    source = checkpoint_of(TIED)
    assert open_checkpoint(ours(tmp_path, source, released(source))).layout == "qwen_mlx"


@pytest.mark.parametrize("variant", [TIED, UNTIED, MOE])
def test_text_only_names(variant: str, checkpoint_of: CheckpointOf, tmp_path: Path) -> None:
    source = checkpoint_of(variant)
    folder = write(tmp_path, source, text_only(released(source)))
    assert np.array_equal(logits(folder), logits(source))


@pytest.mark.parametrize(
    "other",
    [
        "vision_tower.blocks.0.attn.qkv.weight",
        "vision_tower.patch_embed.proj.weight",
        "model.visual.merger.norm.weight",
        "model.language_model.visual.merger.norm.weight",
        "mtp.layers.0.input_layernorm.weight",
        "mtp.fc.weight",
        "model.mtp.fc.weight",
        "language_model.mtp.norm.weight",
        "language_model.mtp.layers.0.self_attn.q_norm.weight",
    ],
)
def test_vision_and_draft_tensors_change_nothing(other: str, checkpoint_of: CheckpointOf, tmp_path: Path) -> None:
    source = checkpoint_of(TIED)
    tensors = mlx_layout(released(source))
    with_other = write(tmp_path / "with", source, {**tensors, other: mx.full((8,), 9.0)})
    assert np.array_equal(logits(with_other), logits(write(tmp_path / "without", source, tensors)))


def test_a_draft_head_with_bare_names_beside_the_model(checkpoint_of: CheckpointOf, tmp_path: Path) -> None:
    source = checkpoint_of(TIED)
    write(tmp_path, source, {"fc.weight": mx.zeros((8, 8)), "layers.0.input_layernorm.weight": mx.zeros((8,))})
    (tmp_path / "model.safetensors").rename(tmp_path / "model-mtp.safetensors")
    assert np.array_equal(logits(write(tmp_path, source, released(source))), logits(source))


@pytest.mark.parametrize("index", [True, False], ids=["index", "no index"])
@pytest.mark.parametrize(
    "pattern", ["model-{:05}-of-00002.safetensors", "model.safetensors-{:05}-of-00002.safetensors"], ids=["mlx", "hub"]
)
def test_shards(pattern: str, index: bool, checkpoint_of: CheckpointOf, tmp_path: Path) -> None:
    source = checkpoint_of(UNTIED)
    assert np.array_equal(logits(sharded(tmp_path, source, released(source), pattern, index)), logits(source))


def test_the_index_decides_which_files_are_read(checkpoint_of: CheckpointOf, tmp_path: Path) -> None:
    source = checkpoint_of(UNTIED)
    folder = sharded(tmp_path, source, released(source), "model-{:05}-of-00002.safetensors", True)
    write(folder, source, {"left.over": mx.zeros((8,))}, "model-old.safetensors")
    assert np.array_equal(logits(folder), logits(source))


@pytest.mark.parametrize("name", ["lm_head.weight", "language_model.lm_head.weight"])
def test_a_tied_checkpoint_may_store_its_head_again(name: str, checkpoint_of: CheckpointOf, tmp_path: Path) -> None:
    source = checkpoint_of(TIED)
    tensors = released(source)
    head = tensors["model.language_model.embed_tokens.weight"]
    assert np.array_equal(logits(write(tmp_path, source, {**tensors, name: head})), logits(source))


Spoil = Callable[[Path, Path], object]
"""(folder to write, golden checkpoint to start from)"""
EMBEDDING, FIRST = "model.language_model.embed_tokens.weight", "model.language_model.layers.0."


def with_tensors(change: Callable[[Tensors], object], layout: Callable[[Tensors], Tensors] = dict) -> Spoil:
    def spoil(folder: Path, source: Path) -> None:
        tensors = layout(released(source))
        change(tensors)
        write(folder, source, tensors)

    return spoil


def with_bytes(content: Callable[[bytes], bytes], file: str = "model.safetensors") -> Spoil:
    def spoil(folder: Path, source: Path) -> None:
        ours(folder, source, released(source))
        (folder / file).write_bytes(content((folder / file).read_bytes()))

    return spoil


def with_header(name: str, **entry: object) -> Spoil:
    """One entry of the header told otherwise, the data left as they are."""

    def change(content: bytes) -> bytes:
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        header[name] |= entry
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + content[8 + length :]

    return with_bytes(change)


def without_shard(pattern: str, index: bool) -> Spoil:
    def spoil(folder: Path, source: Path) -> None:
        sharded(folder, source, released(source), pattern, index)
        (folder / pattern.format(2)).unlink()

    return spoil


def shifted(amount: float, *endings: str) -> Callable[[Tensors], None]:
    def shift(tensors: Tensors) -> None:
        for name in tensors:
            if name.endswith(endings):
                tensors[name] = tensors[name] + amount

    return shift


def one_converted_layer(tensors: Tensors) -> None:
    tensors[FIRST + "linear_attn.conv1d.weight"] = tensors[FIRST + "linear_attn.conv1d.weight"].swapaxes(1, 2)


def replaced(name: str, value: mx.array) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: value})


def with_index(content: object) -> Spoil:
    def spoil(folder: Path, source: Path) -> None:
        write(folder, source, released(source))
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))

    return spoil


def twice(folder: Path, source: Path) -> None:
    sharded(folder, source, released(source), "model-{:05}-of-00002.safetensors", False)
    write(folder, source, {EMBEDDING: mx.zeros((384, 128))}, "model-extra.safetensors")


def foreign_gains(folder: Path, source: Path) -> None:
    ours(folder, source, released(source))
    write(folder, source, {name: 2 * gain for name, gain in exact_gains(released(source)).items()}, GAINS)


def unknown_gains(folder: Path, source: Path) -> None:
    ours(folder, source, released(source))
    write(folder, source, {"language_model.model.layers.0.extra_norm.weight": mx.ones((8,))}, GAINS)


def no_weights(folder: Path, source: Path) -> None:
    write(folder, source, {})
    (folder / "model.safetensors").unlink()


INPUT, POST = "input_layernorm.weight", "post_attention_layernorm.weight"
BAD = {
    "empty folder": (
        lambda folder, source: folder.mkdir(exist_ok=True),
        "is not a model folder: it has no config.json",
    ),
    "no weights": (no_weights, "holds no model*.safetensors file"),
    "shard of the index missing": (
        without_shard("model-{:05}-of-00002.safetensors", True),
        "lacks model-00002-of-00002.safetensors; download the model again",
    ),
    "shard missing": (
        without_shard("model-{:05}-of-00002.safetensors", False),
        "lacks model-00002-of-00002.safetensors; download the model again",
    ),
    "hub's shard missing": (
        without_shard("model.safetensors-{:05}-of-00002.safetensors", False),
        "lacks model.safetensors-00002-of-00002.safetensors",
    ),
    "index without map": (with_index({}), "has no weight_map from tensors to files"),
    "index with numbers": (with_index({"weight_map": {"a": 1}}), "has no weight_map from tensors to files"),
    "empty index": (with_index({"weight_map": {}}), "holds no model*.safetensors file"),
    "empty file": (with_bytes(lambda content: b""), "model.safetensors is truncated or no safetensors file: 0 bytes"),
    "cut in the header": (with_bytes(lambda content: content[:100]), "is truncated or no safetensors file: 100 bytes"),
    "cut in the data": (with_bytes(lambda content: content[:-1]), "bytes; download it again"),
    "web page": (with_bytes(lambda content: b"<!doctype html><p>404"), "is truncated or no safetensors file: 21 bytes"),
    "garbage header": (
        with_bytes(lambda content: content[:8] + b"\xff" * (len(content) - 8)),
        "is no safetensors file: its header cannot be read",
    ),
    "header is a list": (
        with_bytes(lambda content: (2).to_bytes(8, "little") + b"[]"),
        "is no safetensors file: its header cannot be read",
    ),
    "shape beyond its data": (
        with_header("language_model.model.norm.weight", shape=[256]),
        "model.safetensors cannot be loaded (",
    ),
    "unknown kind of number": (
        with_header("language_model.model.norm.weight", dtype="F6"),
        "model.safetensors cannot be loaded (",
    ),
    "cut gains": (with_bytes(lambda content: content[:-1], GAINS), "gains.safetensors is truncated"),
    "gains of another model": (foreign_gains, "gains.safetensors does not belong to the weights beside it"),
    "unknown gains": (unknown_gains, "gains.safetensors holds unknown gains: model.layers.0.extra_norm.weight"),
    "missing tensor": (
        with_tensors(lambda tensors: tensors.pop(EMBEDDING)),
        "lacks model.embed_tokens.weight; download or convert",
    ),
    "extra layer": (
        with_tensors(replaced("model.language_model.layers.9.mlp.up_proj.weight", mx.zeros((8, 8)))),
        "holds tensors that its config.json does not speak of: model.layers.9.mlp.up_proj.weight",
    ),
    "foreign tensor": (
        with_tensors(replaced("transformer.h.0.attn.weight", mx.zeros((8, 8)))),
        "holds tensors that Qwen3.5 does not have: transformer.h.0.attn.weight",
    ),
    "wrong shape": (
        with_tensors(replaced(EMBEDDING, mx.zeros((384, 64)))),
        "model.embed_tokens.weight has shape (384, 64), config.json asks for (384, 128)",
    ),
    "integers": (
        with_tensors(replaced(EMBEDDING, mx.zeros((384, 128), mx.uint8))),
        "model.embed_tokens.weight is stored as mlx.core.uint8, where mlx.core.float32 is wanted",
    ),
    "integer gains": (
        with_tensors(replaced("model.language_model.norm.weight", mx.zeros((128,), mx.uint8))),
        "model.norm.weight is stored as mlx.core.uint8, where mlx.core.float32 is wanted",
    ),
    "a convolution of nothing": (
        with_tensors(replaced("model.language_model.layers.0.linear_attn.conv1d.weight", mx.zeros((0, 1, 4)))),
        "model.layers.0.linear_attn.conv1d.weight has shape (0, 4), config.json asks for",
    ),
    "two conventions": (with_tensors(one_converted_layer), "mixes files of two conventions"),
    "no convolution at all": (
        with_tensors(replaced(FIRST + "linear_attn.conv1d.weight", mx.zeros((384, 4)))),
        "conv1d.weight must be [channels, 1, taps] or [channels, taps, 1], not [384, 4]",
    ),
    "gains shifted twice": (with_tensors(shifted(1, INPUT, POST), mlx_layout), "shifted once too often or too little"),
    "gains never shifted": (with_tensors(shifted(-1, INPUT, POST), mlx_layout), "shifted once too often or too little"),
    "released gains shifted": (with_tensors(shifted(1, INPUT, POST)), "too little for the released layout"),
    "one family shifted twice": (with_tensors(shifted(1, POST), mlx_layout), "the post_attention norms were shifted"),
    "one family never shifted": (with_tensors(shifted(-1, INPUT), mlx_layout), "the input norms were shifted"),
    "stored twice": (twice, f"{EMBEDDING} is stored twice, in model-"),
    "stored under two names": (
        with_tensors(lambda tensors: tensors.update({mlx_name(EMBEDDING): tensors[EMBEDDING]})),
        "stores model.embed_tokens.weight twice, under different names",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_folder_earns_one_sentence(case: str, checkpoint_of: CheckpointOf, tmp_path: Path) -> None:
    spoil, said = BAD[case]
    spoil(tmp_path, checkpoint_of(TIED))
    with pytest.raises(CheckpointError) as caught:
        load_model(tmp_path)
    message = str(caught.value)
    assert (said in message, message.count(". "), message[-1]) == (True, 0, "."), message


def fused_and_apart(tensors: Tensors) -> None:
    tensors["model.language_model.layers.1.mlp.switch_mlp.gate_proj.weight"] = mx.zeros((8, 64, 128))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            replaced(FIRST + "mlp.experts.gate_up_proj", mx.zeros((8, 128))),
            "must be [experts, 2 x size, hidden size], not [8, 128]",
        ),
        (
            replaced(FIRST + "mlp.experts.gate_up_proj", mx.zeros((8, 64, 128))),
            "switch_mlp.gate_proj.weight has shape (8, 32, 128), config.json asks for (8, 64, 128)",
        ),
        (fused_and_apart, "layers.1.mlp.switch_mlp.gate_proj.weight twice, under different names"),
    ],
    ids=["two axes", "too small", "fused and apart"],
)
def test_bad_experts(
    change: Callable[[Tensors], object], said: str, checkpoint_of: CheckpointOf, tmp_path: Path
) -> None:
    with_tensors(change)(tmp_path, checkpoint_of(MOE))
    with pytest.raises(CheckpointError) as caught:
        load_model(tmp_path)
    assert said in str(caught.value)


def test_the_golden_checkpoint_holds_a_draft_head(checkpoint_of: CheckpointOf) -> None:
    """So that every test here that starts from one says that it is passed over."""
    tensors = released(checkpoint_of(TIED))
    assert len(trunk(tensors)) < len(tensors)
