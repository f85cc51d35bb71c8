"""The eight released sizes, built from their configurations: parameters and tensors as published, nothing computed."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from qwen_mlx.config import read_config
from qwen_mlx.model.qwen import Qwen

MiB = 2**20


@dataclass(frozen=True)
class Size:
    """Fields of the released config.json, and what the release holds."""

    hidden_size: int
    num_hidden_layers: int
    heads: tuple[int, int]  # query, key/value
    linear_num_value_heads: int
    tied: bool
    published: int  # parameters of the whole checkpoint
    vision: int
    mtp: int
    text_tensors: int
    intermediate_size: int = 0
    experts: tuple[int, int, int] | None = None  # how many, chosen, their size and the shared one's


SIZES = {
    "0.8B": Size(1024, 24, (8, 2), 16, True, 873_438_784, 100_592_896, 20_452_864, 320, 3584),
    "2B": Size(2048, 24, (8, 2), 16, True, 2_274_069_824, 331_416_576, 60_828_160, 320, 6144),
    "4B": Size(2560, 32, (16, 4), 32, True, 4_659_865_088, 333_514_240, 120_599_552, 426, 9216),
    "9B": Size(4096, 32, (16, 4), 32, False, 9_653_104_368, 456_010_480, 243_290_624, 427, 12288),
    "27B": Size(5120, 64, (24, 4), 48, False, 27_781_427_952, 460_730_096, 424_699_392, 851, 17408),
    "35B-A3B": Size(2048, 40, (16, 2), 32, False, 35_951_822_704, 446_571_248, 844_640_768, 693, experts=(256, 8, 512)),
    "122B-A10B": Size(
        3072, 48, (32, 2), 64, False, 125_086_497_008, 451_290_864, 2_523_679_232, 831, experts=(256, 8, 1024)
    ),
    "397B-A17B": Size(
        4096, 60, (32, 2), 64, False, 403_397_928_944, 456_010_480, 6_595_568_128, 1038, experts=(512, 10, 1024)
    ),
}
# Of the text model without embeddings and head, where it is known exactly.
WITHOUT_EMBEDDINGS = {
    "0.8B": 498_113_344,
    "2B": 1_373_265_728,
    "4B": 3_570_052_096,
    "9B": 6_919_565_824,
    "27B": 24_353_201_664,
}
EMBEDDING = {
    "0.8B": 254_279_680,
    "2B": 508_559_360,
    "4B": 635_699_200,
    "9B": 1_017_118_720,
    "27B": 1_271_398_400,
    "35B-A3B": 508_559_360,
    "122B-A10B": 762_839_040,
    "397B-A17B": 1_017_118_720,
}


def config_json(size: Size) -> dict[str, Any]:
    text: dict[str, Any] = {
        "hidden_size": size.hidden_size,
        "num_hidden_layers": size.num_hidden_layers,
        "full_attention_interval": 4,
        "num_attention_heads": size.heads[0],
        "num_key_value_heads": size.heads[1],
        "head_dim": 256,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": size.linear_num_value_heads,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
        "vocab_size": 248320,
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": size.tied,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000_000,
            "partial_rotary_factor": 0.25,
            "mrope_section": [11, 11, 10],
        },
    }
    if size.experts is None:
        return {"model_type": "qwen3_5", "text_config": text | {"intermediate_size": size.intermediate_size}}
    number, chosen, inner = size.experts
    text |= {
        "num_experts": number,
        "num_experts_per_tok": chosen,
        "moe_intermediate_size": inner,
        "shared_expert_intermediate_size": inner,
    }
    return {"model_type": "qwen3_5_moe", "text_config": text}


@pytest.fixture(scope="module", params=SIZES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def built(name: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, mx.array], int]:
    """The parameters of that size, lazy, and the bytes that building them took."""
    folder: Path = tmp_path_factory.mktemp(name)
    (folder / "config.json").write_text(json.dumps(config_json(SIZES[name])))
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    parameters = tree_flatten(Qwen(read_config(folder)).parameters(), destination={})
    return parameters, mx.get_peak_memory() - before


def test_parameters_are_those_of_the_release(name: str, built: tuple[dict[str, mx.array], int]) -> None:
    size = SIZES[name]
    assert sum(a.size for a in built[0].values()) == size.published - size.vision - size.mtp


@pytest.mark.parametrize("name", WITHOUT_EMBEDDINGS, indirect=True)
def test_parameters_without_embeddings(name: str, built: tuple[dict[str, mx.array], int]) -> None:
    layers = [a.size for n, a in built[0].items() if not n.startswith(("model.embed_tokens", "lm_head"))]
    assert sum(layers) == WITHOUT_EMBEDDINGS[name]


def test_embedding_and_head(name: str, built: tuple[dict[str, mx.array], int]) -> None:
    expected = {"model.embed_tokens.weight": EMBEDDING[name]}
    if not SIZES[name].tied:
        expected["lm_head.weight"] = EMBEDDING[name]
    assert {n: a.size for n, a in built[0].items() if n.startswith(("model.embed_tokens", "lm_head"))} == expected


def test_tensors_are_those_of_the_release(name: str, built: tuple[dict[str, mx.array], int]) -> None:
    size = SIZES[name]
    split = size.num_hidden_layers if size.experts else 0  # the release stores the experts' gate and up as one tensor
    assert len(built[0]) == size.text_tensors + split


def test_building_computes_nothing(built: tuple[dict[str, mx.array], int]) -> None:
    assert built[1] < MiB
