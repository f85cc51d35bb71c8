"""config.json: what is read, and the one sentence that each bad file earns."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen_mlx.config import FULL, LINEAR, ModelConfig, MoeConfig, RopeParameters, TextConfig, read_config
from qwen_mlx.errors import CheckpointError
from tests.golden.checkpoints import VARIANTS, config

DENSE, MOE = "a-r1-d32", "d-moe"
Change = Callable[[dict[str, Any]], object]

# Sizes of the released models: hidden, layers, query heads, KV heads, value heads, MLP (or experts), tied.
RELEASED = {
    "0.8B": (1024, 24, 8, 2, 16, 3584, True),
    "2B": (2048, 24, 8, 2, 16, 6144, True),
    "4B": (2560, 32, 16, 4, 32, 9216, True),
    "9B": (4096, 32, 16, 4, 32, 12288, False),
    "27B": (5120, 64, 24, 4, 48, 17408, False),
    "35B-A3B": (2048, 40, 16, 2, 32, (256, 8, 512, 512), False),
    "122B-A10B": (3072, 48, 32, 2, 64, (256, 8, 1024, 1024), False),
    "397B-A17B": (4096, 60, 32, 2, 64, (512, 10, 1024, 1024), False),
}


def write(folder: Path, content: object, name: str = "config.json") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(content))
    return folder


def read(folder: Path, variant: str, change: Change = lambda raw: None) -> ModelConfig:
    raw = config(VARIANTS[variant])
    change(raw)
    return read_config(write(folder, raw))


def text(**values: Any) -> Change:
    return lambda raw: raw["text_config"].update(values)


def without(name: str) -> Change:
    def remove(raw: dict[str, Any]) -> None:
        for source in (raw, raw["text_config"]):
            source.pop(name, None)

    return remove


def rope(**values: Any) -> Change:
    return lambda raw: raw["text_config"]["rope_parameters"].update(values)


def yarn(**values: Any) -> Change:
    """The scaling of the model cards, but for `values`."""
    return rope(**{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096, **values})


def without_rope(name: str) -> Change:
    def remove(raw: dict[str, Any]) -> None:
        raw["text_config"].pop(name, None)
        del raw["text_config"]["rope_parameters"][name]

    return remove


def released(size: str) -> dict[str, Any]:
    hidden, layers, heads, kv_heads, value_heads, mlp, tied = RELEASED[size]
    raw = config(VARIANTS[MOE if isinstance(mlp, tuple) else DENSE])
    raw["text_config"] |= {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "layer_types": [FULL if i % 4 == 3 else LINEAR for i in range(layers)],
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 256,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": value_heads,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "vocab_size": 248320,
        "max_position_embeddings": 262144,
        "tie_word_embeddings": tied,
    }
    raw["text_config"]["rope_parameters"]["mrope_section"] = [11, 11, 10]
    if isinstance(mlp, tuple):
        names = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size")
        raw["text_config"] |= dict(zip(names, mlp))
    else:
        raw["text_config"]["intermediate_size"] = mlp
    return raw | {"tie_word_embeddings": tied}


@pytest.mark.parametrize("size", RELEASED)
def test_released_sizes(size: str, tmp_path: Path) -> None:
    hidden, layers, heads, kv_heads, value_heads, mlp, tied = RELEASED[size]
    experts = isinstance(mlp, tuple)
    assert read_config(write(tmp_path, released(size))).text == TextConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        layer_types=(LINEAR, LINEAR, LINEAR, FULL) * (layers // 4),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=256,
        linear_num_key_heads=16,
        linear_num_value_heads=value_heads,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        linear_conv_kernel_dim=4,
        vocab_size=248320,
        max_position_embeddings=262144,
        rms_norm_eps=1e-6,
        rope_parameters=RopeParameters(1e7, 0.25, (11, 11, 10)),
        tie_word_embeddings=tied,
        intermediate_size=0 if experts else mlp,
        moe=MoeConfig(*mlp) if experts else None,
    )


def test_rotary_dimensions_of_the_released_models(tmp_path: Path) -> None:
    assert read_config(write(tmp_path, released("0.8B"))).text.rotary_dim == 64


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_flat_file_says_the_same(variant: str, tmp_path: Path) -> None:
    raw = config(VARIANTS[variant])
    flat = read_config(write(tmp_path / "flat", raw["text_config"]))
    assert flat.text == read_config(write(tmp_path / "nested", raw)).text


def test_layer_types_follow_from_the_interval(tmp_path: Path) -> None:
    assert read(tmp_path, "b-r2-d64", without("layer_types")).text.layer_types == (LINEAR, LINEAR, LINEAR, FULL) * 2


def test_mlx_lm_calls_the_rope_type_type(tmp_path: Path) -> None:
    def rename(raw: dict[str, Any]) -> None:
        rope = raw["text_config"]["rope_parameters"]
        rope["type"] = rope.pop("rope_type")

    assert read(tmp_path / "type", DENSE, rename) == read(tmp_path / "rope_type", DENSE)


@pytest.mark.parametrize("place", ["inside", "beside"])
def test_tied_or_not_may_be_said_in_one_place(place: str, tmp_path: Path) -> None:
    def move(raw: dict[str, Any]) -> None:
        without("tie_word_embeddings")(raw)
        (raw["text_config"] if place == "inside" else raw)["tie_word_embeddings"] = False

    assert read(tmp_path, DENSE, move).text.tie_word_embeddings is False


def test_end_of_text_is_the_union_of_all_that_is_named(tmp_path: Path) -> None:
    raw = config(VARIANTS[DENSE])
    raw["eos_token_id"], raw["text_config"]["eos_token_id"] = 5, [7, 6]
    write(tmp_path, {"eos_token_id": [6, 9]}, "generation_config.json")
    assert read_config(write(tmp_path, raw)).eos_token_ids == (5, 6, 7, 9)


def test_generation_config_is_kept(tmp_path: Path) -> None:
    write(tmp_path, {"temperature": 0.6}, "generation_config.json")
    assert read(tmp_path, DENSE).generation == {"temperature": 0.6}


def test_generation_config_may_be_absent(tmp_path: Path) -> None:
    assert read(tmp_path, DENSE).generation == {}


@pytest.mark.parametrize(
    "quantization",
    [
        {"quantization": {"group_size": 64, "bits": 4}},
        {"quantization_config": {"group_size": 64, "bits": 4, "mode": "affine"}},
        {"quantization": {"group_size": None, "bits": 4}, "quantization_config": {"group_size": None, "bits": 4}},
        {"quantization_config": None},
    ],
    ids=["quantization", "quantization_config", "no group size", "null"],
)
def test_mlx_quantization_is_left_to_the_tensors(quantization: dict[str, Any], tmp_path: Path) -> None:
    plain = read(tmp_path / "plain", DENSE)
    assert read(tmp_path / "quantized", DENSE, lambda raw: raw.update(quantization)) == plain


SIZES = [
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_conv_kernel_dim",
    "vocab_size",
    "max_position_embeddings",
]
DENSE_SIZES = [(DENSE, name) for name in (*SIZES, "intermediate_size")]
MOE_SIZES = [
    (MOE, name)
    for name in ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size")
]


def refusal(folder: Path, variant: str, change: Change) -> str:
    with pytest.raises(CheckpointError) as caught:
        read(folder, variant, change)
    return str(caught.value)


@pytest.mark.parametrize("bad", [0, -1, 2.5, True, "64", 2**31])
@pytest.mark.parametrize(("variant", "name"), DENSE_SIZES + MOE_SIZES)
def test_a_size_must_be_a_positive_integer(variant: str, name: str, bad: object, tmp_path: Path) -> None:
    said = refusal(tmp_path, variant, text(**{name: bad}))
    assert said == f"config.json: {name} must be a positive integer, it is {bad!r}."


@pytest.mark.parametrize(
    ("variant", "name"),
    [*DENSE_SIZES, *MOE_SIZES, (DENSE, "rms_norm_eps"), (DENSE, "rope_parameters"), (DENSE, "tie_word_embeddings")],
)
@pytest.mark.parametrize("how", ["absent", "null"])
def test_no_default_stands_in_for_a_missing_value(variant: str, name: str, how: str, tmp_path: Path) -> None:
    def change(raw: dict[str, Any]) -> None:
        without(name)(raw)
        if how == "null":
            raw["text_config"][name] = None

    assert refusal(tmp_path, variant, change) == f"config.json lacks {name}; take the file of the original release."


@pytest.mark.parametrize("name", ["rope_theta", "mrope_section", "partial_rotary_factor"])
def test_no_default_stands_in_for_a_missing_rotary_value(name: str, tmp_path: Path) -> None:
    said = refusal(tmp_path, DENSE, without_rope(name))
    assert said == f"config.json lacks {name}; take the file of the original release."


@pytest.mark.parametrize(
    ("variant", "change", "said"),
    [
        (DENSE, lambda raw: raw.update(model_type="llama"), "model of type 'llama'; qwen_mlx runs Qwen3.5 only"),
        (DENSE, lambda raw: raw.pop("model_type"), "model of type None; qwen_mlx runs Qwen3.5 only"),
        (DENSE, lambda raw: raw.update(text_config=[1]), "text_config must be an object, it is [1]"),
        (DENSE, lambda raw: raw.update(model_type="qwen3_5_moe"), "lacks num_experts"),
        (MOE, lambda raw: raw.update(model_type="qwen3_5"), "lacks intermediate_size"),
        (DENSE, text(num_attention_heads=3), "num_attention_heads (3) must be a multiple of num_key_value_heads (2)"),
        (
            DENSE,
            text(linear_num_value_heads=6),
            "linear_num_value_heads (6) must be a multiple of linear_num_key_heads (4)",
        ),
        (MOE, text(num_experts_per_tok=9), "num_experts_per_tok (9) exceeds num_experts (8)"),
        (DENSE, text(layer_types=[FULL] * 3), "layer_types must name 4 layers"),
        (DENSE, text(layer_types=[LINEAR] * 4), f"one at least {FULL}"),
        (DENSE, text(layer_types=[FULL] * 3 + ["mamba"]), "it names 4: full_attention, mamba"),
        (DENSE, text(layer_types=[FULL] * 3 + [["mamba"]]), "it names 4: ['mamba'], full_attention"),
        (DENSE, text(layer_types=FULL), "layer_types must be a list, it is 'full_attention'"),
        (DENSE, text(layer_types=None, full_attention_interval=5), f"one at least {FULL}"),
        (DENSE, text(layer_types=None, full_attention_interval=0), "full_attention_interval must be a positive"),
        (DENSE, text(rms_norm_eps=0), "rms_norm_eps must be a positive number, it is 0"),
        (DENSE, text(rms_norm_eps="1e-6"), "rms_norm_eps must be a positive number, it is '1e-6'"),
        (DENSE, text(rms_norm_eps=float("nan")), "rms_norm_eps must be a positive number, it is nan"),
        (DENSE, text(tie_word_embeddings="false"), "tie_word_embeddings must be true or false"),
        (DENSE, text(tie_word_embeddings=False), "the same in text_config and beside it; it is False and True"),
        (DENSE, text(attention_bias=True), "attention_bias True is not supported; Qwen3.5 has False"),
        (DENSE, text(attn_output_gate=False), "attn_output_gate False is not supported; Qwen3.5 has True"),
        (DENSE, text(hidden_act="gelu"), "hidden_act 'gelu' is not supported; Qwen3.5 has 'silu'"),
        (DENSE, text(rope_parameters=[1]), "rope_parameters must be an object, it is [1]"),
        (DENSE, rope(rope_type="linear", factor=4), "rope_type 'linear' is not supported; only 'default' and 'yarn'"),
        (DENSE, rope(rope_type="yarn", factor=4), "lacks original_max_position_embeddings"),
        (DENSE, yarn(factor=None), "lacks factor"),
        (DENSE, yarn(factor=0.5), "YaRN needs a factor of at least 1"),
        (DENSE, yarn(factor="4"), "factor must be a positive number, it is '4'"),
        (DENSE, yarn(beta_fast=1, beta_slow=2), "they are 4, 1, 2 and 1e+07"),
        (DENSE, yarn(rope_theta=1), "rope_theta above 1"),
        (DENSE, yarn(attention_factor=0), "attention_factor must be a positive number, it is 0"),
        (DENSE, yarn(truncate="no"), "truncate must be true or false, it is 'no'"),
        (DENSE, rope(rope_theta=-1), "rope_theta must be a positive number, it is -1"),
        (DENSE, rope(mrope_section=[3, 3]), "mrope_section must be three sizes, it is [3, 3]"),
        (DENSE, rope(mrope_section=[3, 6, -1]), "mrope_section must be three sizes, it is [3, 6, -1]"),
        (DENSE, rope(mrope_section=8), "mrope_section must be a list, it is 8"),
        (DENSE, rope(mrope_section=[3, 3, 3]), "mrope_section [3, 3, 3] must sum to half of the 16 rotary dimensions"),
        (DENSE, rope(partial_rotary_factor=2), "must sum to half of the 128 rotary dimensions"),
        (DENSE, rope(partial_rotary_factor=1e-9, mrope_section=[0, 0, 0]), "of the 0 rotary dimensions"),
        (DENSE, text(eos_token_id="<|im_end|>"), "eos_token_id must be a token id or a list of them"),
        (DENSE, text(eos_token_id=[True]), "eos_token_id must be a token id or a list of them, it holds True"),
        (DENSE, lambda raw: raw.update(quantization_config={"quant_method": "fp8"}), "quantized by 'fp8'"),
        (DENSE, text(quantization_config={"quant_method": "awq"}), "quantized by 'awq'"),
        (DENSE, lambda raw: raw.update(quantization_config="int4"), "quantization_config must be an object"),
    ],
)
def test_a_config_that_cannot_be_run(variant: str, change: Change, said: str, tmp_path: Path) -> None:
    assert said in refusal(tmp_path, variant, change)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "is not a model folder: it has no config.json"),
        (b"", "config.json cannot be read as JSON"),
        (b'{"model_type": ', "config.json cannot be read as JSON"),
        (b"\xff\xfe{", "config.json cannot be read as JSON"),
        (b"[]", "config.json must hold a JSON object, it holds list"),
        (b"[" * 100_000, "config.json cannot be read as JSON"),
    ],
)
def test_a_file_that_is_no_config(content: bytes | None, said: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=said):
        read_config(tmp_path)


def test_a_broken_generation_config(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text("{")
    assert "generation_config.json cannot be read as JSON" in refusal(tmp_path, DENSE, lambda raw: None)
