"""Whatever is wrong with a folder that is converted: one sentence that names file and tensor, nothing half-written.

A table of damages drives the tests. Most are found before anything is written.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from qwen_mlx.cli import run
from qwen_mlx.config import MODEL_TYPES
from qwen_mlx.convert.folder import Request, finish, write
from qwen_mlx.convert.opened import Opened, open_model
from qwen_mlx.errors import CheckpointError
from qwen_mlx.load import load_model
from tests.convert.test_source import fp8, quantized_like_mlx_lm, write_fp8
from tests.layouts import Tensors, draft_head, exact_gains, mlx_layout, released, single_experts, text_only, trunk
from tests.layouts import write as write_layout

CheckpointOf = Callable[[str], Path]
Change = Callable[[Path], object]
"""What is done to a copy of a golden checkpoint."""
Case = tuple[Change, tuple[str, ...]]
"""The damage, and what the sentence must say of it."""

TIED, UNTIED, MOE = "a-r1-d32", "f-k32-v64", "d-moe"
WEIGHTS, INDEX, GAINS = "model.safetensors", "model.safetensors.index.json", "qwen_mlx/gains.safetensors"
LAYER = "model.language_model.layers.1."
GATE, UP, DOWN = (f"{LAYER}mlp.{kind}_proj.weight" for kind in ("gate", "up", "down"))
OUR_UP = "model.layers.1.mlp.up_proj.weight"
TOKENS = mx.array([[5, 7, 11, 13, 17, 300, 2, 1]])


def convert(opened: Opened, mlx_path: Path) -> None:
    request = Request(mlx_path, "bfloat16", lambda path: None, {})
    write(opened, request)
    finish(request)


def rewritten(change: Callable[[bytes], bytes], file: str = WEIGHTS) -> Change:
    return lambda folder: (folder / file).write_bytes(change((folder / file).read_bytes()))


def header(edit: Callable[[dict[str, Any]], object]) -> Change:
    """The header of the weights after `edit`; the data stay."""

    def change(content: bytes) -> bytes:
        length = int.from_bytes(content[:8], "little")
        entries = json.loads(content[8 : 8 + length])
        edit(entries)
        text = json.dumps(entries).encode()
        return len(text).to_bytes(8, "little") + text + content[8 + length :]

    return rewritten(change)


def entry(name: str, **told: Any) -> Change:
    return header(lambda entries: entries[name].update(told))


def with_offsets(name: str, change: Callable[[int, int], list[Any]]) -> Change:
    return header(lambda entries: entries[name].update(data_offsets=change(*entries[name]["data_offsets"])))


def told_twice(content: bytes) -> bytes:
    length = int.from_bytes(content[:8], "little")
    text = content[8 : 8 + length].rstrip()
    told = json.dumps(json.loads(text)[UP])
    text = text[:-1] + f', "{UP}": {told}}}'.encode()
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def weights(edit: Callable[[Tensors], object], layout: Callable[[Tensors], Tensors] = dict) -> Change:
    """The tensors of `layout` after `edit`."""

    def change(folder: Path) -> None:
        tensors = layout(released(folder))
        mx.eval(tensors)
        edit(tensors)
        mx.save_safetensors(str(folder / WEIGHTS), tensors, metadata={"format": "mlx"})

    return change


def without(*endings: str) -> Callable[[Tensors], object]:
    return lambda tensors: [tensors.pop(name) for name in list(tensors) if name.endswith(endings)]


def put(name: str, array: mx.array) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: array})


def changed(name: str, change: Callable[[mx.array], mx.array]) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: change(tensors[name])})


def in_shards(edit: Callable[[dict[str, str]], object] = lambda weight_map: None, extra: str | None = None) -> Change:
    """Three shards, the draft head in the last, and an index after `edit`; `extra` of another one stands there, too."""

    def change(folder: Path) -> None:
        tensors = released(folder)
        mx.eval(tensors)
        text = trunk(tensors)
        parts = [dict(list(text.items())[i::2]) for i in (0, 1)]
        parts.append({name: array for name, array in tensors.items() if name not in text})
        if extra is not None:
            parts[2][extra] = tensors[extra]
        files = [f"model-{i:05}-of-00003.safetensors" for i in (1, 2, 3)]
        weight_map = {name: file for file, part in zip(files, parts) for name in part}
        for file, part in zip(files, parts):
            mx.save_safetensors(str(folder / file), part)
        (folder / WEIGHTS).unlink()
        edit(weight_map)
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    return change


def at(file: str) -> Callable[[dict[str, str]], object]:
    """An index that has one tensor in `file`."""
    return lambda weight_map: weight_map.update({UP: file})


def configured(**values: Any) -> Change:
    """Other values in text_config, and where they stand beside it; None takes one away."""

    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["text_config"] |= values
        config |= {name: value for name, value in values.items() if name in config}
        (folder / "config.json").write_text(json.dumps(config))

    return change


def outside(**values: Any) -> Change:
    """Other values beside text_config."""

    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))

    return change


def holding(file: str, content: bytes) -> Change:
    return lambda folder: (folder / file).write_bytes(content)


def quantized(edit: Callable[[Tensors], object]) -> Change:
    """4 bits in groups of 32, as mlx-lm writes them."""
    return weights(edit, lambda tensors: quantized_like_mlx_lm(tensors, 4))


def in_fp8(edit: Callable[[Tensors], object]) -> Change:
    def change(folder: Path) -> None:
        tensors = fp8(released(folder))
        mx.eval(tensors)
        edit(tensors)
        source = folder.rename(folder.with_name("source"))
        write_fp8(folder, source, tensors)

    return change


def as_directory(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()


def long_header(content: bytes) -> bytes:
    """Blanks behind the header, up to the length that no header may have."""
    length = int.from_bytes(content[:8], "little")
    return (100_000_008).to_bytes(8, "little") + content[8 : 8 + length].ljust(100_000_008) + content[8 + length :]


def other_gains(folder: Path) -> None:
    tensors = released(folder)
    mx.eval(tensors)
    source = folder.rename(folder.with_name("source"))
    write_layout(folder, source, mlx_layout(tensors))
    write_layout(folder, source, {name: 2 * gain for name, gain in exact_gains(tensors).items()}, GAINS)


def single(tensors: Tensors) -> Tensors:
    """Experts one by one, in trunk and draft head."""
    head = {f"mtp.{name}": array for name, array in single_experts(draft_head(tensors)).items()}
    return single_experts(trunk(tensors)) | head


def shifted(tensors: Tensors) -> None:
    for name in tensors:
        if name.endswith("input_layernorm.weight"):
            tensors[name] = tensors[name] + 1


def nested(levels: int) -> bytes:
    return b"[" * levels + b"]" * levels


Q = "language_model.model.layers.1.mlp.up_proj"
HEADERS: dict[str, Case] = {
    "overlap": (
        header(lambda e: e[UP].update(data_offsets=e[GATE]["data_offsets"])),
        (WEIGHTS, UP, "overlaps with the tensor before it"),
    ),
    "hole": (header(lambda e: e.pop(UP)), (WEIGHTS, DOWN, "leaves a hole behind the tensor before it")),
    "beyond the end": (with_offsets(UP, lambda a, b: [a + 2**40, b + 2**40]), (WEIGHTS, "is truncated", "download")),
    "end before start": (with_offsets(UP, lambda a, b: [b, a]), (WEIGHTS, UP, "header cannot be read")),
    "negative start": (with_offsets(UP, lambda a, b: [a - b, 0]), (WEIGHTS, UP, "header cannot be read")),
    "three offsets": (with_offsets(UP, lambda a, b: [a, b, b]), (WEIGHTS, UP, "header cannot be read")),
    "offset with a fraction": (with_offsets(UP, lambda a, b: [a, b + 0.5]), (WEIGHTS, UP, "header cannot be read")),
    "offset as text": (with_offsets(UP, lambda a, b: [a, str(b)]), (WEIGHTS, UP, "header cannot be read")),
    "negative size": (entry(UP, shape=[-192, -128]), (WEIGHTS, UP, "header cannot be read")),
    "no shape": (entry(UP, shape=None), (WEIGHTS, UP, "header cannot be read")),
    "true as size": (entry(UP, shape=[192, 128, True]), (WEIGHTS, UP, "header cannot be read")),
    "size of 2**40": (entry(UP, shape=[2**40, 0]), (WEIGHTS, UP, "header cannot be read")),
    "entry is a list": (header(lambda e: e.update({UP: []})), (WEIGHTS, UP, "header cannot be read")),
    "shape beyond its bytes": (entry(UP, shape=[193, 128]), (WEIGHTS, UP, "[193, 128] in BF16, cannot have 49152")),
    "empty shape": (entry(UP, shape=[]), (WEIGHTS, UP, "[] in BF16, cannot have 49152 bytes")),
    "dtype of another width": (entry(UP, dtype="F32"), (WEIGHTS, UP, "in F32, cannot have 49152 bytes")),
    "dtype nobody knows": (entry(UP, dtype="F6"), (WEIGHTS, UP, "stored as F6")),
    "dtype is no text": (entry(UP, dtype=["BF16"]), (WEIGHTS, UP, "stored as ['BF16']")),
    "float32 told as integers": (
        entry(LAYER + "linear_attn.A_log", dtype="U32"),
        ("model.layers.1.linear_attn.A_log is stored as", "uint32"),
    ),
    "told twice": (rewritten(told_twice), (WEIGHTS, UP, "twice")),
    "metadata is no text": (header(lambda e: e.update(__metadata__={"format": 1})), (WEIGHTS, "header cannot be read")),
    "metadata is no Unicode": (
        header(lambda e: e.update(__metadata__={"format": "\ud800"})), (WEIGHTS, "header cannot be read")
    ),
    "name is no Unicode": (
        header(lambda e: e.update({"visual.\ud800": e.pop(UP)})), (WEIGHTS, "header cannot be read")
    ),
    "nested deeply": (
        rewritten(lambda c: (20_000).to_bytes(8, "little") + nested(10_000)), (WEIGHTS, "header cannot be read")
    ),
    "longer than a header may be": (rewritten(long_header), (WEIGHTS, "header cannot be read")),
    "length of 2**63": (rewritten(lambda c: (2**63).to_bytes(8, "little") + c[8:]), (WEIGHTS, "is truncated or no")),
    "cut in the data": (rewritten(lambda c: c[:-1]), (WEIGHTS, "is truncated", "download it again")),
    "cut in the header": (rewritten(lambda c: c[:99]), (WEIGHTS, "is truncated or no safetensors file", "download")),
    "bytes behind the data": (rewritten(lambda c: c + b"\0"), (WEIGHTS, "bytes, and its header tells of")),
    "empty": (rewritten(lambda c: b""), (WEIGHTS, "is truncated or no safetensors file: 0 bytes")),
}  # fmt: skip
FILES: dict[str, Case] = {
    "a directory": (as_directory, ("lacks model.safetensors", "download the model again")),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), ("holds no model*.safetensors",)),
    "shard missing": (
        lambda folder: (folder / WEIGHTS).rename(folder / "model-00001-of-00002.safetensors"),
        ("lacks model-00002-of-00002.safetensors", "download the model again"),
    ),
    "stored in two shards": (
        in_shards(extra=UP), (UP, "stored twice, in model-", "model-00003-of-00003.safetensors")
    ),
    "index names a file that is not there": (in_shards(at("model-9.safetensors")), ("lacks model-9.safetensors",)),
    "index climbs out": (in_shards(at("../x.safetensors")), (INDEX, "outside of its folder: ../x.safetensors")),
    "index climbs out on a detour": (in_shards(at("a/../../x")), (INDEX, "outside of its folder: a/../../x")),
    "index is absolute": (in_shards(at("/x.safetensors")), (INDEX, "outside of its folder: /x.safetensors")),
    "index names the folder": (in_shards(at("")), ("lacks",)),
    "index names what no file can be called": (in_shards(at("x" * 5000)), ("lacks xxx",)),
    "index with a NUL": (in_shards(at("a\0b")), ("lacks a\0b",)),
    "index with a number": (in_shards(lambda m: m.update({UP: 1})), (INDEX, "no weight_map")),  # type: ignore[dict-item]
    "index has it in another shard": (
        in_shards(at("model-00003-of-00003.safetensors")), (INDEX, f"model-00003-of-00003.safetensors holds {UP}")
    ),
    "index lists what is nowhere": (
        in_shards(lambda m: m.update({"model.visual.norm.weight": "model-00001-of-00003.safetensors"})),
        (INDEX, "model-00001-of-00003.safetensors holds model.visual.norm.weight, which it does not"),
    ),
    "index leaves a shard out": (
        in_shards(lambda m: [m.pop(name) for name in list(m) if name.startswith("mtp.")]),
        (INDEX, "lists nothing of model-00003-of-00003.safetensors"),
    ),
    "index is a list": (holding(INDEX, b"[]"), (INDEX, "must hold a JSON object, it holds list")),
    "index is cut": (holding(INDEX, b'{"weight_map": {'), (INDEX, "cannot be read as JSON")),
}  # fmt: skip
TENSORS: dict[str, Case] = {
    "NaN": (weights(changed(UP, lambda a: a * float("nan"))), (WEIGHTS, OUR_UP, "holds NaN or infinity", "download")),
    "infinity in a gain": (
        weights(changed(LAYER + "input_layernorm.weight", lambda a: a + float("inf"))),
        (WEIGHTS, "model.layers.1.input_layernorm.weight holds NaN or infinity"),
    ),
    "NaN in the draft head": (weights(changed("mtp.fc.weight", lambda a: a * float("nan"))), ("fc.weight holds NaN",)),
    "missing": (weights(without("layers.1.mlp.up_proj.weight")), (f"lacks {OUR_UP}", "download or convert")),
    "of no Qwen3.5": (weights(put("h.0.weight", mx.zeros((2, 2)))), ("Qwen3.5 does not have: h.0.weight",)),
    "not spoken of": (weights(put(UP + "s", mx.zeros((2, 2)))), (OUR_UP + "s", "config.json does not speak of")),
    "under two names": (
        weights(lambda t: t.update({OUR_UP: t[UP]})), (f"stores {OUR_UP} twice, under different names",)
    ),
    "integers": (weights(changed(UP, lambda a: a.astype(mx.int64))), (WEIGHTS, OUR_UP, "stored as I64", "BF16")),
    "integer gain": (
        weights(put("model.language_model.norm.weight", mx.ones(128, mx.uint32))),
        ("model.norm.weight is stored as", "uint32"),
    ),
    "integer gain of the draft head": (
        weights(put("mtp.norm.weight", mx.ones(128, mx.uint32))), ("MTP head", "norm.weight is stored as", "uint32")
    ),
    "a number alone": (
        weights(put("model.visual.scale", mx.array(1.0))), (WEIGHTS, "vision_tower.scale is a number alone")
    ),
    "two conventions": (
        weights(changed(LAYER + "linear_attn.conv1d.weight", lambda a: a.swapaxes(1, 2))),
        ("mixes files of two conventions", LAYER + "linear_attn.conv1d.weight"),
    ),
    "norms shifted twice": (weights(shifted, mlx_layout), ("norms were shifted", "convert the original release")),
    "gains of another model": (other_gains, (GAINS, "does not belong to the weights beside it: model.")),
    "vision alone": (
        weights(lambda t: t.update({"model.visual.norm.weight": mx.ones(8)}), lambda tensors: {}),
        ("lacks", "model.embed_tokens.weight"),
    ),
    "a vision tensor under two names": (
        weights(lambda t: t.update({"model.visual.a.weight": mx.ones(8), "visual.a.weight": mx.ones(8)})),
        ("stores vision_tower.a.weight twice",),
    ),
    "draft head lacks a tensor": (weights(without("mtp.fc.weight")), ("MTP head", "lacks fc.weight")),
    "draft head of another shape": (
        weights(put("mtp.fc.weight", mx.zeros((128, 128)))), ("MTP head", "fc.weight has shape (128, 128)")
    ),
    "draft head of two layers": (configured(mtp_num_hidden_layers=2), ("config.json", "mtp_num_hidden_layers is 2")),
}  # fmt: skip
QUANTIZED: dict[str, Case] = {
    "no scales": (quantized(without(f"{Q}.scales", f"{Q}.biases")), (f"{OUR_UP} has shape (192, 16)",)),
    "scales without weight": (quantized(without(f"{Q}.weight")), (f"lacks {OUR_UP}",)),
    "no biases": (quantized(without(f"{Q}.biases")), ("model.layers.1.mlp.up_proj", "is stored as")),
    "groups of 16": (
        quantized(lambda t: t.update({f"{Q}.{k}": mx.repeat(t[f"{Q}.{k}"], 2, axis=1) for k in ("scales", "biases")})),
        ("model.layers.1.mlp.up_proj is quantized in a way MLX does not know: 4 bits in groups of 16",),
    ),
    "bits that are none": (
        quantized(changed(f"{Q}.weight", lambda a: a[:, :13])), ("model.layers.1.mlp.up_proj is quantized in a way",)
    ),
    "no columns": (quantized(changed(f"{Q}.scales", lambda a: a[:, :0])), ("model.layers.1.mlp.up_proj",)),
    "FP8 without a scale": (in_fp8(without(f"{UP}_scale_inv")), (WEIGHTS, OUR_UP, "is FP8 without _scale_inv")),
    "FP8 scale of another shape": (
        in_fp8(put(f"{UP}_scale_inv", mx.ones((9, 9)))), (WEIGHTS, OUR_UP, "128 x 128 block, it has [9, 9]")
    ),
    "FP8 scale alone": (in_fp8(without(UP)), (WEIGHTS, f"{OUR_UP}_scale_inv scales no FP8 tensor")),
    "NaN in FP8": (in_fp8(changed(UP, lambda a: mx.full(a.shape, 0x7F, mx.uint8))), (WEIGHTS, OUR_UP, "holds NaN")),
    "by another program": (outside(quantization_config={"quant_method": "awq"}), ("quantized by 'awq'",)),
}  # fmt: skip
CONFIG = "config.json"
CONFIGS: dict[str, Case] = {
    "missing": (lambda folder: (folder / CONFIG).unlink(), ("has no config.json",)),
    "a list": (holding(CONFIG, b"[]"), (CONFIG, "must hold a JSON object, it holds list")),
    "cut": (holding(CONFIG, b'{"model_type": '), (CONFIG, "cannot be read as JSON")),
    "latin1": (holding(CONFIG, b'{"a": "\xe9"}'), (CONFIG, "cannot be read as JSON")),
    "a number of 5000 digits": (holding(CONFIG, b'{"a": ' + b"1" * 5000 + b"}"), (CONFIG, "cannot be read as JSON")),
    "nested 100 deep": (holding(CONFIG, b'{"a": ' + nested(100) + b"}"), (CONFIG, "objects or lists inside each")),
    "nested 100,000 deep": (holding(CONFIG, b'{"a": ' + nested(100_000) + b"}"), (CONFIG, "cannot be read as JSON")),
    "another architecture": (outside(model_type="llama"), ("type 'llama'", *MODEL_TYPES)),
    "architecture is a list": (outside(model_type=["qwen3_5"]), ("type ['qwen3_5']", *MODEL_TYPES)),
    "text_config is a list": (outside(text_config=[]), (CONFIG, "text_config must be an object")),
    "value missing": (configured(hidden_size=None), (CONFIG, "lacks hidden_size")),
    "size of 2**40": (configured(hidden_size=2**40), (CONFIG, "hidden_size must be a positive integer, it is 1099")),
    "size of 2**30": (configured(vocab_size=2**30), (CONFIG, "vocab_size is 1073741824, and no model has more")),
    "a million layers": (
        configured(num_hidden_layers=10**6, layer_types=None), (CONFIG, "num_hidden_layers is 1000000")
    ),
    "heads beyond all matrices": (
        configured(num_attention_heads=2**23, num_key_value_heads=2**20), (CONFIG, "num_attention_heads x head_dim is")
    ),
    "a factor of 10**400": (
        configured(rope_parameters={"rope_theta": 1, "mrope_section": [1, 1, 1], "partial_rotary_factor": 10**400}),
        (CONFIG, "partial_rotary_factor must be a positive number"),
    ),
    "a factor of 1e308": (
        configured(rope_parameters={"rope_theta": 1, "mrope_section": [1, 1, 1], "partial_rotary_factor": 1e308}),
        (CONFIG, "partial_rotary_factor must be a positive number"),
    ),
    "shapes of another model": (
        configured(intermediate_size=256),
        ("model.layers.0.mlp.gate_proj.weight has shape (192, 128), config.json asks for (256, 128)", "one release"),
    ),
    "a larger model than the machine": (
        configured(vocab_size=2**24), ("embed_tokens.weight has shape (384, 128)", "asks for (16777216, 128)")
    ),
    "generation_config is no JSON": (holding("generation_config.json", b"{"), ("generation_config.json", "as JSON")),
    "generation_config is a list": (holding("generation_config.json", b"[1]"), ("generation_config.json", "list")),
}  # fmt: skip
OTHERS: dict[str, tuple[str, Change, tuple[str, ...]]] = {
    "said to be tied": (
        UNTIED, configured(tie_word_embeddings=True), ("lm_head.weight is not model.embed_tokens.weight", "tie_word")
    ),
    "said not to be tied": (TIED, configured(tie_word_embeddings=False), ("lacks lm_head.weight",)),
    "an expert is missing": (
        MOE, weights(without("layers.1.mlp.experts.5.up_proj.weight"), single),
        ("model.layers.1.mlp.switch_mlp.up_proj.weight lacks expert 5", "download the model again"),
    ),
    "the last expert is missing": (
        MOE, weights(without("layers.1.mlp.experts.7.up_proj.weight"), single),
        ("model.layers.1.mlp.switch_mlp.up_proj.weight has shape (7, 64, 128)",),
    ),
    "an expert of another shape": (
        MOE, weights(changed(f"{LAYER}mlp.experts.5.up_proj.weight", lambda a: a[:9]), single),
        ("model.layers.1.mlp.switch_mlp.up_proj.weight: expert 5 has another shape",),
    ),
    "an expert with a number of its own": (
        MOE, weights(put(f"{LAYER}mlp.experts.00.up_proj.weight", mx.zeros((64, 128), mx.bfloat16)), single),
        ("model.layers.1.mlp.experts.00.up_proj.weight",),
    ),
    "experts together and apart": (
        MOE, weights(put(f"{LAYER}mlp.experts.gate_up_proj", mx.zeros((8, 128, 128), mx.bfloat16)), single),
        ("stores model.layers.1.mlp.switch_mlp.", "twice, under different names"),
    ),
    "experts of two axes": (
        MOE, weights(put(f"{LAYER}mlp.experts.gate_up_proj", mx.zeros((8, 128)))),
        ("model.layers.1.mlp.experts.gate_up_proj must be [experts, 2 x size, hidden size], not [8, 128]",),
    ),
    "an expert of the draft head is missing": (
        MOE, weights(without("mtp.layers.0.mlp.experts.2.down_proj.weight"), single),
        ("layers.0.mlp.switch_mlp.down_proj.weight lacks expert 2",),
    ),
    "no expert at all": (
        MOE, weights(lambda t: [t.pop(name) for name in list(t) if ".experts." in name and "layers.1." in name]),
        ("lacks model.layers.1.mlp.switch_mlp.",),
    ),
    "another number of experts": (MOE, configured(num_experts=16), ("config.json asks for (16,",)),
}  # fmt: skip
ALL: dict[str, tuple[str, Change, tuple[str, ...]]] = OTHERS | {
    f"{kind}: {name}": (TIED, *case)
    for kind, cases in (
        ("header", HEADERS), ("files", FILES), ("tensors", TENSORS), ("quantized", QUANTIZED), ("config", CONFIGS)
    )
    for name, case in cases.items()
}  # fmt: skip


@pytest.mark.parametrize(("variant", "change", "said"), ALL.values(), ids=ALL.keys())
def test_a_bad_folder_earns_one_sentence_and_leaves_nothing(
    variant: str, change: Change, said: tuple[str, ...], checkpoint_of: CheckpointOf, tmp_path: Path
) -> None:
    folder = shutil.copytree(checkpoint_of(variant), tmp_path / "model")
    change(folder)
    there = {path.name for path in tmp_path.iterdir()}
    mx.reset_peak_memory()
    held = mx.get_active_memory()
    with pytest.raises(CheckpointError) as caught:
        convert(open_model(folder), tmp_path / "converted")
    message = str(caught.value)
    assert [part for part in said if part not in message] == [], message
    assert (message.count(". "), message[-1]) == (0, "."), message
    assert {path.name for path in tmp_path.iterdir()} - there <= {"converted.partial"}
    assert mx.get_peak_memory() - held < 16 << 20  # the checkpoints have 2 MB


@pytest.mark.parametrize("name", ["header: overlap", "files: index climbs out", "tensors: NaN", "config: a list"])
def test_a_command_answers_with_it_and_2(
    name: str, checkpoint_of: CheckpointOf, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    variant, change, said = ALL[name]
    folder = shutil.copytree(checkpoint_of(variant), tmp_path / "model")
    change(folder)
    code = run(lambda: convert(open_model(folder), tmp_path / "converted"))
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n"), err.startswith("error: ")) == (2, "", 1, True)
    assert all(part in err for part in said)


def test_a_file_that_vanishes_is_named(
    checkpoint_of: CheckpointOf, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Between its opening and its reading: a plain OSError, of which commands make a sentence."""
    folder = shutil.copytree(checkpoint_of(TIED), tmp_path / "model")
    opened = open_model(folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError):
        convert(opened, tmp_path / "converted")
    assert run(lambda: convert(opened, tmp_path / "converted")) == 2
    assert capsys.readouterr().err == f"error: {folder / WEIGHTS}: No such file or directory.\n"
    assert not (tmp_path / "converted").exists()


def test_a_file_that_shrinks_is_named(checkpoint_of: CheckpointOf, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint_of(TIED), tmp_path / "model")
    opened = open_model(folder)
    os.truncate(folder / WEIGHTS, 100_000)
    with pytest.raises(CheckpointError, match=r"model\.safetensors ends within model\.embed_tokens\.weight"):
        convert(opened, tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


def logits(folder: Path) -> np.ndarray:
    return np.array(load_model(folder, dtype="float32")(TOKENS))


def reordered(entries: dict[str, Any]) -> None:
    for name in reversed(list(entries)):
        entries[name] = entries.pop(name)


def empty_of(name: str, *shape: int) -> Change:
    return weights(put(name, mx.zeros(shape, mx.bfloat16)))


HARMLESS: dict[str, Change] = {
    "no tokenizer, as it is": lambda folder: None,
    "header in another order": header(reordered),
    "index in order": in_shards(),
    "index of the text alone names all its files": in_shards(lambda m: [m.pop(n) for n in list(m) if "norm" in n]),
    "text-only names": weights(lambda tensors: None, text_only),
    "the head stored a second time": weights(lambda t: t.update({"lm_head.weight": released_embedding(t)})),
    "vision tensor without rows": empty_of("model.visual.blocks.0.norm.bias", 0, 8),
    "vision tensor without columns": empty_of("model.visual.blocks.0.norm.bias", 8, 0),
    "lone surrogate": outside(note="\ud800"),
    "draft layers said to be none": configured(mtp_num_hidden_layers=None),
    "draft layers as text": configured(mtp_num_hidden_layers="one"),
}


def released_embedding(tensors: Tensors) -> mx.array:
    return tensors["model.language_model.embed_tokens.weight"]


@pytest.mark.parametrize("change", HARMLESS.values(), ids=HARMLESS.keys())
def test_what_is_odd_and_harmless_converts(change: Change, checkpoint_of: CheckpointOf, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint_of(TIED), tmp_path / "model")
    change(folder)
    convert(open_model(folder), tmp_path / "converted")
    assert np.array_equal(logits(tmp_path / "converted"), logits(checkpoint_of(TIED)))
    assert not (tmp_path / "converted/tokenizer.json").exists()


@pytest.mark.parametrize("prefix", ["", "model.", "language_model.", "model.language_model.", "language_model.model."])
def test_draft_head_and_vision_tower_are_told_by_every_prefix(
    prefix: str, checkpoint_of: CheckpointOf, tmp_path: Path
) -> None:
    def rename(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith("mtp.")]:
            tensors[prefix + name] = tensors.pop(name)
        tensors[prefix + "visual.norm.weight"] = mx.ones(8, mx.bfloat16)

    folder = shutil.copytree(checkpoint_of(TIED), tmp_path / "model")
    weights(rename)(folder)
    source = open_model(folder).source
    assert source.vision.keys() == {"vision_tower.norm.weight"}
    assert source.mtp.keys() == open_model(checkpoint_of(TIED)).source.mtp.keys()


@pytest.mark.parametrize("said", [None, "one", 0, 1.0, 1])
def test_a_draft_head_is_described_as_it_is(said: object, checkpoint_of: CheckpointOf, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint_of(TIED), tmp_path / "model")
    configured(mtp_num_hidden_layers=said)(folder)
    convert(open_model(folder), tmp_path / "converted")
    head, model = (json.loads((tmp_path / "converted" / f).read_text()) for f in ("mtp/config.json", CONFIG))
    assert (head["block_size"], head["text_config"]["mtp_num_hidden_layers"]) == (3, 1)
    assert model["text_config"]["mtp_num_hidden_layers"] == 1
