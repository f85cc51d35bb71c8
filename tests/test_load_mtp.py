"""Where draft heads are found, under which names, in which convention, and what a broken one is told."""

import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from qwen_mlx.errors import CheckpointError
from qwen_mlx.hub import resolve
from qwen_mlx.load_mtp import absolute_gains, find_mtp, load_mtp
from qwen_mlx.model.mtp import MTPHead
from qwen_mlx.model.qwen import Qwen
from tests.golden.checkpoints import VARIANTS
from tests.golden.compare import load as load_golden
from tests.layouts import (
    Tensors,
    absolute_head,
    draft_head,
    mlx_layout,
    released,
    single_experts,
    stacked_experts,
    trunk,
    write,
)
from tests.model.test_mtp import assert_golden

CheckpointOf = Callable[[str], Path]
ModelOf = Callable[[str, str], Qwen]
TIED, MOE = "a-r1-d32", "d-moe"
SIDECARS = (
    "mtp/model.safetensors",
    "mtp/weights.safetensors",
    "mtp.safetensors",
    "model-mtp.safetensors",
    "model-mtp-head.safetensors",
)


def weights(head: MTPHead) -> Tensors:
    return dict(tree_flatten(head.parameters()))


def same(head: MTPHead, other: MTPHead) -> bool:
    ours, theirs = weights(head), weights(other)
    return ours.keys() == theirs.keys() and all(mx.array_equal(ours[name], theirs[name]) for name in ours)


def prefixed(head: Tensors, prefix: str = "mtp.") -> Tensors:
    return {prefix + name: array for name, array in head.items()}


def converted(head: Tensors) -> Tensors:
    """Bare names, gains 1 + w, experts stacked: as qwen_mlx and mlx-vlm write a head."""
    return stacked_experts(absolute_head(head))


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(variant: str, model_of: ModelOf) -> Qwen:
    return model_of(variant, "float32")


def golden_holds(variant: str, model: Qwen, folder: Path) -> None:
    assert_golden(model, load_mtp(folder, model), load_golden(variant), 65)


@pytest.mark.parametrize("sidecar", SIDECARS)
def test_a_sidecar_with_bare_names(
    variant: str, sidecar: str, model: Qwen, checkpoint_of: CheckpointOf, tmp_path: Path
) -> None:
    source = checkpoint_of(variant)
    tensors = released(source)
    write(tmp_path, source, mlx_layout(tensors))
    golden_holds(variant, model, write(tmp_path, source, converted(draft_head(tensors)), sidecar))


def test_in_the_shards_of_a_conversion(variant: str, model: Qwen, checkpoint_of: CheckpointOf, tmp_path: Path) -> None:
    source = checkpoint_of(variant)
    tensors = released(source)
    head = prefixed(converted(draft_head(tensors)), "language_model.mtp.")
    golden_holds(variant, model, write(tmp_path, source, mlx_layout(tensors) | head))


def cases() -> dict[str, tuple[str, Callable[[Tensors], Tensors], str]]:
    """How the head of d-moe may lie beside a conversion: name of the file, what is done to it, who wrote it."""
    found = {}
    for sidecar in SIDECARS:
        for by, name in (("mlx", "bare, 1 + w"), ("mlx", "mtp., 1 + w"), ("pt", "mtp., w"), ("mlx", "mtp., w")):
            names = prefixed if name.startswith("mtp.") else dict
            gains = absolute_head if name.endswith("1 + w") else dict
            found[f"{sidecar}: {name}, by {by}"] = (sidecar, lambda h, n=names, g=gains: n(g(h)), by)
    return found


CASES = cases()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("experts", [dict, stacked_experts, single_experts])
def test_every_name_and_convention_is_the_same_head(
    case: str, experts: Callable[[Tensors], Tensors], checkpoint_of: CheckpointOf, model_of: ModelOf, tmp_path: Path
) -> None:
    source, model = checkpoint_of(MOE), model_of(MOE, "float32")
    sidecar, form, by = CASES[case]
    tensors = released(source)
    write(tmp_path, source, mlx_layout(tensors))
    folder = write(tmp_path, source, form(experts(draft_head(tensors))), sidecar, by)
    assert same(load_mtp(folder, model), load_mtp(source, model))


@pytest.mark.parametrize("prefix", ["mtp.", "model.mtp.", "language_model.mtp.", "model.language_model.mtp."])
@pytest.mark.parametrize("convention", [dict, absolute_head], ids=["w", "1 + w"])
@pytest.mark.parametrize("layout", [trunk, mlx_layout], ids=["released", "mlx"])
def test_in_the_main_shards(
    prefix: str,
    convention: Callable[[Tensors], Tensors],
    layout: Callable[[Tensors], Tensors],
    checkpoint_of: CheckpointOf,
    model_of: ModelOf,
    tmp_path: Path,
) -> None:
    source, model = checkpoint_of(TIED), model_of(TIED, "float32")
    tensors = released(source)
    folder = write(tmp_path, source, layout(tensors) | prefixed(convention(draft_head(tensors)), prefix))
    assert same(load_mtp(folder, model), load_mtp(source, model))


def test_over_several_shards(checkpoint_of: CheckpointOf, model_of: ModelOf, tmp_path: Path) -> None:
    source, model = checkpoint_of(TIED), model_of(TIED, "float32")
    tensors = list(released(source).items())
    for i in (1, 2, 3):
        write(tmp_path, source, dict(tensors[i - 1 :: 3]), f"model-{i:05}-of-00003.safetensors")
    assert same(load_mtp(tmp_path, model), load_mtp(source, model))


def test_a_folder_of_its_own_in_several_shards(checkpoint_of: CheckpointOf, model_of: ModelOf, tmp_path: Path) -> None:
    source, model = checkpoint_of(TIED), model_of(TIED, "float32")
    head = list(converted(draft_head(released(source))).items())
    write(tmp_path, source, mlx_layout(released(source)))
    for i in (1, 2):
        write(tmp_path, source, dict(head[i - 1 :: 2]), f"mtp/model-{i:05}-of-00002.safetensors")
    assert same(load_mtp(tmp_path, model), load_mtp(source, model))


@pytest.mark.parametrize("where", ["file", "folder"])
@pytest.mark.parametrize("form", [converted, prefixed], ids=["bare", "mtp."])
def test_a_head_of_its_own(
    where: str, form: Callable[[Tensors], Tensors], checkpoint_of: CheckpointOf, model_of: ModelOf, tmp_path: Path
) -> None:
    source, model = checkpoint_of(TIED), model_of(TIED, "float32")
    by = "mlx" if form is converted else "pt"
    folder = write(tmp_path, source, form(draft_head(released(source))), made_by=by)
    path = folder / "model.safetensors" if where == "file" else folder
    assert same(load_mtp(path, model), load_mtp(source, model))


def test_one_of_many_files_holds_it(checkpoint_of: CheckpointOf, model_of: ModelOf) -> None:
    source, model = checkpoint_of(TIED), model_of(TIED, "float32")
    assert same(load_mtp(str(source / "model.safetensors"), model), load_mtp(source, model))


def test_a_head_beside_the_shards_goes_before_one_inside(
    checkpoint_of: CheckpointOf, model_of: ModelOf, tmp_path: Path
) -> None:
    source, model = checkpoint_of(TIED), model_of(TIED, "float32")
    tensors = released(source)
    other = converted(draft_head(tensors)) | {"fc.weight": mx.ones((128, 256))}
    write(tmp_path, source, tensors)
    head = load_mtp(write(tmp_path, source, other, "mtp.safetensors"), model)
    assert (head.fc.weight == 1).all().item()


@pytest.mark.parametrize("layout", [trunk, mlx_layout], ids=["released", "mlx"])
def test_without_a_head(
    layout: Callable[[Tensors], Tensors], checkpoint_of: CheckpointOf, model_of: ModelOf, tmp_path: Path
) -> None:
    source = checkpoint_of(TIED)
    assert load_mtp(write(tmp_path, source, layout(released(source))), model_of(TIED, "float32")) is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("variant", [TIED, MOE])
def test_gains_are_float32_and_all_else_of_the_models_dtype(
    variant: str, dtype: str, checkpoint_of: CheckpointOf, model_of: ModelOf
) -> None:
    model = model_of(variant, dtype)
    kinds = {name: array.dtype for name, array in weights(load_mtp(checkpoint_of(variant), model)).items()}
    assert {kind for name, kind in kinds.items() if "norm" in name} == {mx.float32}
    assert {kind for name, kind in kinds.items() if "norm" not in name} == {model.dtype}


def test_gains_are_one_plus_w_before_they_are_rounded(checkpoint_of: CheckpointOf, model_of: ModelOf) -> None:
    source = checkpoint_of(TIED)
    head = weights(load_mtp(source, model_of(TIED, "bfloat16")))
    stored = {
        name: np.array(a.astype(mx.float32)) for name, a in draft_head(released(source)).items() if "norm" in name
    }
    assert len(stored) == 7
    for name, w in stored.items():
        assert np.array_equal(np.array(head[name]), 1 + w)


@pytest.mark.parametrize(("mode", "group_size", "bits"), [("affine", 64, 4), ("affine", 32, 8), ("mxfp4", 32, 4)])
@pytest.mark.parametrize("variant", [TIED, MOE])
def test_a_quantized_head_is_the_head_multiplied_out(
    variant: str, mode: str, group_size: int, bits: int, checkpoint_of: CheckpointOf, model_of: ModelOf, tmp_path: Path
) -> None:
    source, model = checkpoint_of(variant), model_of(variant, "float32")
    packed, plain = {}, {}
    for name, array in converted(draft_head(released(source))).items():
        if array.ndim < 2:
            packed[name] = plain[name] = array
            continue
        weight, scales, *biases = mx.quantize(array.astype(mx.float32), group_size, bits, mode=mode)
        path = name.removesuffix("weight")
        packed |= {name: weight, path + "scales": scales} | ({path + "biases": biases[0]} if biases else {})
        plain[name] = mx.dequantize(weight, scales, *biases, group_size=group_size, bits=bits, mode=mode)
    write(tmp_path / "packed", source, packed, "mtp/model.safetensors")
    write(tmp_path / "plain", source, plain, "mtp/model.safetensors")
    quantized, multiplied = (load_mtp(tmp_path / kind, model) for kind in ("packed", "plain"))
    assert isinstance(quantized.fc, nn.QuantizedLinear)
    x = mx.random.normal((2, 1, 9, model.config.text.hidden_size), key=mx.random.key(0))
    outputs = [head(*x, head.make_cache()) for head in (quantized, multiplied)]
    assert mx.max(mx.abs(outputs[0] - outputs[1])).item() < 1e-4


def test_experts_that_were_quantized_one_by_one(checkpoint_of: CheckpointOf, model_of: ModelOf, tmp_path: Path) -> None:
    source, model = checkpoint_of(MOE), model_of(MOE, "float32")
    stacked = converted(draft_head(released(source)))
    for name in [name for name in stacked if "switch_mlp" in name]:
        parts = mx.quantize(stacked[name].astype(mx.float32), 64, 4)
        stacked |= {name.replace("weight", kind): part for kind, part in zip(("weight", "scales", "biases"), parts)}
    write(tmp_path / "stacked", source, stacked, "mtp.safetensors")
    write(tmp_path / "single", source, single_experts(stacked), "mtp.safetensors")
    assert same(*(load_mtp(tmp_path / kind, model) for kind in ("stacked", "single")))


def test_loading_holds_nothing_but_gains_in_memory(
    checkpoint_of: CheckpointOf, model_of: ModelOf, tmp_path: Path
) -> None:
    source, model = checkpoint_of(TIED), model_of(TIED, "float32")
    wide = {name: array.astype(mx.float32) for name, array in draft_head(released(source)).items()}
    write(tmp_path, source, converted(wide), "mtp.safetensors")
    before = mx.get_active_memory()
    head = load_mtp(tmp_path, model)
    assert sum(array.nbytes for array in weights(head).values()) > 500_000
    assert mx.get_active_memory() - before < 50_000


def gains_of(layer: float, qk: float, pre_fc: float, norm: float) -> Tensors:
    """The gains of a head as w, of these means."""
    means = {
        "layers.0.input_layernorm": layer - 0.1,
        "layers.0.post_attention_layernorm": layer + 0.1,
        "layers.0.self_attn.q_norm": qk + 0.01,
        "layers.0.self_attn.k_norm": qk - 0.01,
        "pre_fc_norm_embedding": pre_fc - 0.15,
        "pre_fc_norm_hidden": pre_fc + 0.15,
        "norm": norm,
    }
    noise = np.random.RandomState(0).uniform(-0.5, 0.5, 64)
    return {f"{name}.weight": mx.array(mean + noise - noise.mean()).astype(mx.bfloat16) for name, mean in means.items()}


# Means of w over the layer norms, q and k norms, norms before fc, and of the last norm. The released heads were
# measured by MTPLX (issue 301) and oMLX (pull requests 1507 and 3750); what they do not say of one is as in the other.
MEASURED = {
    "27B": (0.13, 0.75, -0.31, 1.27),
    "4B": (0.35, 0.74, -0.31, 2.58),
    "35B": (0.13, 0.75, -0.62, 1.27),
    "demo": (0.18, 0.07, -0.04, 0.94),
    "untrained": (0.0, 0.0, 0.0, 0.0),
    "untrained, a little off": (0.02, -0.02, 0.02, 0.02),
}


def one_plus(gains: Tensors, *but: str) -> Tensors:
    """1 + w, except for the names that hold one of `but`."""
    return {n: a if any(b in n for b in but) else 1 + a.astype(mx.float32) for n, a in gains.items()}


def agree(found: Tensors, wanted: Tensors) -> bool:
    return found.keys() == wanted.keys() and all(mx.array_equal(found[name], wanted[name]) for name in wanted)


KINDS: dict[str, tuple[Callable[[Tensors], Tensors], str, Callable[[Tensors], Tensors], str, bool]] = {
    "in a release": (trunk, "model.safetensors", prefixed, "pt", True),
    "in a release that MLX rewrote": (trunk, "model.safetensors", prefixed, "mlx", True),
    "in a conversion": (mlx_layout, "model.safetensors", prefixed, "mlx", False),
    "in a conversion by torch": (mlx_layout, "model.safetensors", prefixed, "pt", False),
    "beside one, by torch": (mlx_layout, "mtp.safetensors", prefixed, "pt", True),
    "beside one, by MLX": (mlx_layout, "mtp.safetensors", prefixed, "mlx", False),
    "beside one, bare": (mlx_layout, "mtp.safetensors", dict, "mlx", False),
    "beside one, bare, by torch": (mlx_layout, "mtp.safetensors", dict, "pt", False),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_kind_of_file_holds_w(kind: str, checkpoint_of: CheckpointOf, tmp_path: Path) -> None:
    layout, file, names, by, zero_centred = KINDS[kind]
    source = checkpoint_of(TIED)
    main, head = layout(released(source)), names(draft_head(released(source)))
    write(tmp_path, source, main, made_by=by)
    write(tmp_path, source, main | head if file == "model.safetensors" else head, file, by)
    assert find_mtp(tmp_path).zero_centred == zero_centred


@pytest.mark.parametrize("zero_centred", [True, False])
@pytest.mark.parametrize("stored", [dict, one_plus], ids=["w", "1 + w"])
@pytest.mark.parametrize("head", MEASURED)
def test_known_heads_are_told_by_their_gains_whatever_holds_them(
    head: str, stored: Callable[[Tensors], Tensors], zero_centred: bool
) -> None:
    gains = gains_of(*MEASURED[head])
    assert agree(absolute_gains(Path("head"), stored(gains), zero_centred=zero_centred), one_plus(gains))


@pytest.mark.parametrize("zero_centred", [True, False])
def test_means_that_tell_nothing_leave_it_to_the_kind_of_file(zero_centred: bool) -> None:
    stored = gains_of(0.6, 1.1, 0.3, 1.5)
    found = absolute_gains(Path("head"), stored, zero_centred=zero_centred)
    assert agree(found, one_plus(stored) if zero_centred else {n: a.astype(mx.float32) for n, a in stored.items()})


@pytest.mark.parametrize("zero_centred", [True, False])
def test_gains_that_are_no_numbers_leave_it_to_the_kind_of_file(zero_centred: bool) -> None:
    stored = {"layers.0.input_layernorm.weight": mx.array([np.nan, 0.0]), "norm.weight": mx.array([0.5])}
    found = absolute_gains(Path("head"), stored, zero_centred=zero_centred)
    assert found["norm.weight"].item() == (1.5 if zero_centred else 0.5)


MIXED = [("27B", "pre_fc"), ("4B", "pre_fc"), ("35B", "pre_fc"), ("27B", "self_attn"), ("4B", "self_attn")]
MIXED += [("demo", "self_attn"), ("untrained", "self_attn")]


@pytest.mark.parametrize(("head", "left"), MIXED)
def test_a_family_that_was_left_as_w_is_told_apart(head: str, left: str) -> None:
    gains = gains_of(*MEASURED[head])
    with pytest.warns(
        UserWarning, match=r"head: the norms of the MTP head are of two conventions, read layer norms as"
    ):
        found = absolute_gains(Path("head"), one_plus(gains, left), zero_centred=False)
    assert agree(found, one_plus(gains))


def test_two_conventions_in_a_file_earn_a_warning(
    checkpoint_of: CheckpointOf, model_of: ModelOf, tmp_path: Path
) -> None:
    source, model = checkpoint_of(TIED), model_of(TIED, "float32")
    head = draft_head(released(source))
    mixed = absolute_head(head) | {name: array for name, array in head.items() if "self_attn" in name}
    write(tmp_path, source, mixed, "mtp.safetensors")
    with pytest.warns(UserWarning, match=r"q and k norms as w \(mean 0.01\)") as caught:
        found = load_mtp(tmp_path, model)
    assert (same(found, load_mtp(source, model)), caught[0].filename) == (True, __file__)


@pytest.mark.parametrize("head", MEASURED)
def test_gains_that_were_shifted_twice_are_refused(head: str) -> None:
    with pytest.raises(
        CheckpointError, match=r"^head: the norms of the MTP head were shifted twice, the mean of its l"
    ):
        absolute_gains(Path("head"), one_plus(one_plus(gains_of(*MEASURED[head]))), zero_centred=False)


@pytest.mark.parametrize("stored", [dict, one_plus], ids=["w", "1 + w"])
def test_the_demo_is_read_in_either_convention(stored: Callable[[Tensors], Tensors]) -> None:
    tensors = draft_head(dict(mx.load(str(resolve("demo") / "model.safetensors"))))
    gains = {name: array for name, array in tensors.items() if "norm" in name}
    assert agree(absolute_gains(Path("demo"), stored(gains), zero_centred=stored is dict), one_plus(gains))


Spoil = Callable[[Tensors], object]
UP = "layers.0.mlp.up_proj.weight"


def replaced(name: str, value: mx.array) -> Spoil:
    return lambda head: head.update({name: value})


def without(name: str) -> Spoil:
    return lambda head: head.pop(name)


def half_quantized(head: Tensors) -> None:
    weight, scales, _ = mx.quantize(head["fc.weight"], 64, 4)
    head |= {"fc.weight": weight, "fc.scales": scales}


BAD: dict[str, tuple[Spoil, str]] = {
    "missing": (without("fc.weight"), "lacks fc.weight; download or convert"),
    "missing gain": (without("norm.weight"), "lacks norm.weight; download or convert"),
    "extra": (
        replaced("layers.1.mlp.up_proj.weight", mx.zeros((8, 8))),
        "holds tensors that its config.json does not speak of: layers.1.mlp.up_proj.weight",
    ),
    "embeddings": (
        replaced("embed_tokens.weight", mx.zeros((384, 128))),
        "holds tensors that its config.json does not speak of: embed_tokens.weight",
    ),
    "shape": (replaced(UP, mx.zeros((192, 64))), f"{UP} has shape (192, 64), config.json asks for (192, 128)"),
    "shape of a gain": (
        replaced("layers.0.self_attn.q_norm.weight", mx.ones((32,))),
        "layers.0.self_attn.q_norm.weight has shape (32,), config.json asks for (64,)",
    ),
    "integers": (replaced(UP, mx.zeros((192, 128), mx.uint8)), f"{UP} is stored as mlx.core.uint8, where mlx.core.fl"),
    "integer gains": (
        replaced("norm.weight", mx.ones((128,), mx.uint8)),
        "norm.weight is stored as mlx.core.uint8, where mlx.core.float32 is wanted",
    ),
    "quantization": (half_quantized, "fc is quantized in a way MLX does not know: 4 bits in groups of 64, without"),
}


def refused(path: Path, model: Qwen) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_mtp(path, model)
    message = str(caught.value)
    assert (message.count(". "), message[-1]) == (0, "."), message
    return message


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("sidecar", ["mtp/model.safetensors", "mtp.safetensors"])
def test_a_bad_head_earns_one_sentence_that_names_its_file(
    case: str, sidecar: str, checkpoint_of: CheckpointOf, model_of: ModelOf, tmp_path: Path
) -> None:
    source = checkpoint_of(TIED)
    spoil, said = BAD[case]
    head = converted(draft_head(released(source)))
    spoil(head)
    message = refused(write(tmp_path, source, head, sidecar), model_of(TIED, "float32"))
    assert (said in message, f"The MTP head in {tmp_path / sidecar}" in message) == (True, True), message


def test_a_bad_head_in_the_shards_names_the_shard(
    checkpoint_of: CheckpointOf, model_of: ModelOf, tmp_path: Path
) -> None:
    source = checkpoint_of(TIED)
    tensors = released(source)
    del tensors["mtp.fc.weight"]
    message = refused(write(tmp_path, source, tensors), model_of(TIED, "float32"))
    assert message.startswith(f"The MTP head in {tmp_path / 'model.safetensors'} lacks fc.weight;")


SECOND = "layers.0.mlp.experts.2.down_proj.weight"
BAD_EXPERTS: dict[str, tuple[Spoil, str]] = {
    "one missing": (without(SECOND), f"lacks {SECOND}; download or convert"),
    "one too small": (
        replaced(SECOND, mx.zeros((128, 32))),
        "the experts of layers.0.mlp.experts.*.down_proj.weight differ in shape",
    ),
    "the last missing": (
        without("layers.0.mlp.experts.7.up_proj.weight"),
        "layers.0.mlp.switch_mlp.up_proj.weight has shape (7, 64, 128), config.json asks for (8, 64, 128)",
    ),
    "one by one and at once": (
        replaced("layers.0.mlp.switch_mlp.down_proj.weight", mx.zeros((8, 128, 64))),
        "stores layers.0.mlp.switch_mlp.down_proj.weight twice, under different names",
    ),
    "one by one and fused": (
        replaced("layers.0.mlp.experts.down_proj", mx.zeros((8, 128, 64))),
        "stores layers.0.mlp.switch_mlp.down_proj.weight twice, under different names",
    ),
}


@pytest.mark.parametrize("case", BAD_EXPERTS)
def test_bad_experts(case: str, checkpoint_of: CheckpointOf, model_of: ModelOf, tmp_path: Path) -> None:
    source = checkpoint_of(MOE)
    spoil, said = BAD_EXPERTS[case]
    head = single_experts(absolute_head(draft_head(released(source))))
    spoil(head)
    message = refused(write(tmp_path, source, head, "mtp.safetensors"), model_of(MOE, "float32"))
    assert (said in message, f"{tmp_path / 'mtp.safetensors'}" in message) == (True, True), message


def test_stored_twice(checkpoint_of: CheckpointOf, model_of: ModelOf, tmp_path: Path) -> None:
    source = checkpoint_of(TIED)
    again = {"model.mtp.fc.weight": mx.zeros((128, 256))}
    message = refused(write(tmp_path, source, released(source) | again), model_of(TIED, "float32"))
    assert "stores fc.weight of the MTP head twice, in model.safetensors and model.safetensors" in message


@pytest.mark.parametrize("inside", [True, False], ids=["text_config", "top"])
@pytest.mark.parametrize("file", ["config.json", "mtp/config.json"])
@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        (
            "mtp_use_dedicated_embeddings",
            True,
            "mtp_use_dedicated_embeddings is true, but the MTP head of Qwen3.5 shar",
        ),
        ("mtp_num_hidden_layers", 2, "mtp_num_hidden_layers is 2; only MTP heads of one layer can be run"),
    ],
)
def test_heads_of_another_kind_are_refused(
    name: str,
    value: object,
    said: str,
    file: str,
    inside: bool,
    checkpoint_of: CheckpointOf,
    model_of: ModelOf,
    tmp_path: Path,
) -> None:
    source = checkpoint_of(TIED)
    write(tmp_path, source, converted(draft_head(released(source))), "mtp/model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    (config["text_config"] if inside else config)[name] = value
    (tmp_path / file).write_text(json.dumps(config))
    message = refused(tmp_path, model_of(TIED, "float32"))
    assert message.startswith(f"{tmp_path / file}: {said}"), message


def test_a_path_to_nothing(model_of: ModelOf, tmp_path: Path) -> None:
    message = refused(tmp_path / "mtp.safetensors", model_of(TIED, "float32"))
    assert message == f"There is no file or folder {tmp_path / 'mtp.safetensors'} to read an MTP head from."


def test_a_truncated_sidecar(checkpoint_of: CheckpointOf, model_of: ModelOf, tmp_path: Path) -> None:
    source = checkpoint_of(TIED)
    file = write(tmp_path, source, converted(draft_head(released(source))), "mtp.safetensors") / "mtp.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert refused(tmp_path, model_of(TIED, "float32")).startswith(f"{file} is truncated: ")


def test_float16_refuses_what_it_cannot_hold(checkpoint_of: CheckpointOf, model_of: ModelOf, tmp_path: Path) -> None:
    source = checkpoint_of(TIED)
    head = converted(draft_head(released(source))) | {"fc.weight": mx.full((128, 256), 70000.0)}
    write(tmp_path, source, head, "mtp.safetensors")
    message = refused(tmp_path, model_of(TIED, "float16"))
    assert message.endswith("does not fit float16: fc.weight exceed 65504; load the model in bfloat16.")
    assert load_mtp(tmp_path, model_of(TIED, "bfloat16")) is not None
