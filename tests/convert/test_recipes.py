"""The table of recipes: bits that paths get, bits per weight as arrays weigh, and the released sizes within 5.0."""

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from qwen_mlx.config import TextConfig, read_config
from qwen_mlx.convert.recipes import GATES, MTP_FORM, RECIPES, Form, bits_per_weight, form_of, lowest_bits
from qwen_mlx.convert.sensitivity import quantizable
from qwen_mlx.model.qwen import Qwen
from tests.model.test_sizes import SIZES, config_json

MODES = [*((bits, group, "affine") for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)),
         (4, 32, "mxfp4"), (4, 16, "nvfp4"), (8, 32, "mxfp8")]  # fmt: skip


@cache
def model(name: str) -> Qwen:
    """Of the shapes of that release, computing nothing."""
    with TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config_json(SIZES[name])))
        return Qwen(read_config(Path(folder)))


def config(name: str) -> TextConfig:
    return model(name).config.text


@cache
def forms(recipe: str, name: str) -> dict[str, Form]:
    return {path: form_of(RECIPES[recipe], path, config(name)) for path in quantizable(model(name))}


def weighed(recipe: str, name: str) -> float:
    """Bits per weight by the arrays that MLX would make, all others in bfloat16."""
    chosen = forms(recipe, name)
    matrices = {f"{path}.weight": form for path, form in chosen.items()}
    bits = weights = 0
    for parameter, array in tree_flatten(model(name).parameters()):
        weights += array.size
        form = matrices.get(parameter)
        array = array.astype(mx.bfloat16)
        parts = mx.quantize(array, form.group_size, form.bits, form.mode) if form else [array]
        bits += 8 * sum(part.nbytes for part in parts)
    return bits / weights


@pytest.mark.parametrize(("bits", "group_size", "mode"), MODES)
def test_bits_per_weight_are_those_of_the_arrays(bits: int, group_size: int, mode: str) -> None:
    weight = mx.zeros((8, 256), mx.bfloat16)
    parts = mx.quantize(weight, group_size, bits, mode)
    found = Form(bits, group_size, mode).bits_per_weight
    assert found == 8 * sum(part.nbytes for part in parts) / weight.size


def test_what_has_no_form_is_sixteen_bits_wide() -> None:
    assert bits_per_weight({"a": 300, "b": 100}, {"a": Form(8, 128), "b": None}) == (300 * 8.25 + 100 * 16) / 400
    assert bits_per_weight({"a": 300, "b": 100}, {"a": Form(8, 128)}) == (300 * 8.25 + 100 * 16) / 400


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_bits_per_weight_of_the_released_sizes(recipe: str, name: str) -> None:
    sizes = {parameter.removesuffix(".weight"): a.size for parameter, a in tree_flatten(model(name).parameters())}
    assert bits_per_weight(sizes, forms(recipe, name)) == pytest.approx(weighed(recipe, name), rel=1e-9)


@pytest.mark.parametrize(("recipe", "most"), [("q3", 4.0), ("q4", 5.0), ("q4-gdn", 4.52), ("q6", 6.6), ("q8", 8.51)])
@pytest.mark.parametrize("name", SIZES)
def test_a_recipe_keeps_its_size_on_every_release(recipe: str, most: float, name: str) -> None:
    assert weighed(recipe, name) <= most


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_matrix_of_a_release_has_groups_that_divide_it(recipe: str, name: str) -> None:
    matrices = quantizable(model(name))
    assert all(form.fits(matrices[path].weight.shape[-1]) for path, form in forms(recipe, name).items())


@pytest.mark.parametrize("name", SIZES)
def test_the_form_of_the_draft_head_divides_every_release(name: str) -> None:
    text = config(name)
    inner = text.moe.moe_intermediate_size if text.moe else text.intermediate_size
    assert all(MTP_FORM.fits(size) for size in (text.hidden_size, inner, text.num_attention_heads * text.head_dim))


@pytest.mark.parametrize(("group_size", "size", "fits"), [(64, 192, True), (128, 192, False), (128, 256, True)])
def test_groups_that_do_not_divide_are_told(group_size: int, size: int, fits: bool) -> None:
    assert Form(4, group_size).fits(size) is fits


@pytest.mark.parametrize("name", ["0.8B", "35B-A3B"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_gates_have_eight_bits_at_least(recipe: str, name: str) -> None:
    gates = {path: form.bits for path, form in forms(recipe, name).items() if path.endswith(GATES)}
    assert len(gates) == (2 * 18 if name == "0.8B" else 2 * 30 + 2 * 40)
    assert set(gates.values()) == {8}
    assert lowest_bits("model.layers.0.mlp.gate_proj") == 2


@pytest.mark.parametrize(
    ("path", "bits"),
    [
        ("model.embed_tokens", 4),
        ("lm_head", 6),
        ("model.layers.4.mlp.gate_proj", 4),
        ("model.layers.27.mlp.up_proj", 4),
        ("model.layers.3.mlp.gate_proj", 5),  # the first eighth
        ("model.layers.28.mlp.gate_proj", 5),  # the last eighth
        ("model.layers.3.self_attn.q_proj", 5),
        ("model.layers.7.self_attn.q_proj", 4),
        ("model.layers.7.self_attn.v_proj", 6),
        ("model.layers.31.self_attn.v_proj", 6),
        ("model.layers.7.self_attn.o_proj", 4),
        ("model.layers.4.mlp.down_proj", 5),
        ("model.layers.0.mlp.down_proj", 6),
        ("model.layers.4.linear_attn.in_proj_qkv", 4),
        ("model.layers.4.linear_attn.out_proj", 5),
    ],
)
def test_the_default_raises_what_loses_most(path: str, bits: int) -> None:
    assert form_of(RECIPES["q4"], path, config("9B")) == Form(bits, 128)


def test_a_tied_embedding_is_raised_as_the_head_it_is() -> None:
    assert form_of(RECIPES["q4"], "model.embed_tokens", config("0.8B")).bits == 5


@pytest.mark.parametrize(
    ("path", "bits"),
    [
        ("model.layers.9.mlp.switch_mlp.gate_proj", 4),
        ("model.layers.9.mlp.switch_mlp.down_proj", 5),
        ("model.layers.0.mlp.switch_mlp.gate_proj", 5),
        ("model.layers.9.mlp.shared_expert.gate_proj", 6),
        ("model.layers.9.linear_attn.in_proj_qkv", 6),
        ("model.layers.9.mlp.gate", 8),
    ],
)
def test_experts_bear_fewer_bits_than_what_stands_beside_them(path: str, bits: int) -> None:
    assert form_of(RECIPES["q4"], path, config("35B-A3B")).bits == bits


def test_the_smaller_variant_raises_the_delta_rule_alone() -> None:
    raised = {path.rpartition(".")[2] for path, form in forms("q4-gdn", "9B").items() if form.bits > 4}
    assert raised == {"in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj"}


@pytest.mark.parametrize("name", ["0.8B", "9B", "35B-A3B"])
def test_recipes_grow_with_their_bits(name: str) -> None:
    found = [weighed(recipe, name) for recipe in ("q3", "q4-gdn", "q4", "q6", "q8")]
    assert found == sorted(found)
