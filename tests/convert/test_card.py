"""The card of a conversion: its front matter read back by huggingface_hub, its sentences and numbers, its commands."""

import importlib
import json
import re
import shlex
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from qwen_mlx.convert.card import OWN_ID, card
from qwen_mlx.errors import CheckpointError
from tests.hub_stand_in import wrong_in_card

SOURCE_CARD = """---
library_name: transformers
license: apache-2.0
license_link: https://huggingface.co/Qwen/Qwen3.5-0.8B/blob/main/LICENSE
pipeline_tag: image-text-to-text
base_model: Qwen/Qwen3.5-0.8B-Base
language:
- en
- no
---

# Qwen3.5-0.8B
"""
PROOF = {
    "text": "built-in sample",
    "sha256": "ab" * 32,
    "tokens": 2048,
    "kl_mean": 0.0123,
    "kl_p999": 0.234,
    "top1_agreement": 0.9712,
    "perplexity": 9.1234,
    "perplexity_source": 9.0567,
    "mtp_agreement": 0.6123,
    "mtp_agreement_source": 0.6234,
}
FACTS = {
    "qwen_mlx": "0.1.0",
    "source": {"id": "Qwen/Qwen3.5-0.8B", "hub": True, "revision": "c0ffee", "kind": "released"},
    "command": "python -m qwen_mlx.convert --hf-path Qwen/Qwen3.5-0.8B -q",
    "recipe": "q4",
    "dtype": "bfloat16",
    "bits_per_weight": 4.714,
    "bytes": 503_123_456,
    "kept": {"mtp": True, "vision": False},
    "dropped": ["vision"],
    "verified": True,
    "reason": None,
    "proof": PROOF,
}
QUANTIZED = {"group_size": 64, "bits": 4, "mode": "affine"}
LOCAL = {"id": "my-model", "hub": False, "revision": None, "kind": "MLX"}
Made = Callable[..., str]


@pytest.fixture
def made(tmp_path: Path) -> Made:
    """`made(source_card, config={...}, fact=...)`: the card of a folder with these changes to its two files."""

    def made(source_card: str | None = SOURCE_CARD, config: dict[str, Any] | None = None, **facts: Any) -> str:
        whole = {"model_type": "qwen3_5", "quantization": QUANTIZED} | (config or {})
        described = {key: value for key, value in whole.items() if value is not None}
        (tmp_path / "config.json").write_text(json.dumps(described))
        (tmp_path / "qwen_mlx.json").write_text(json.dumps(FACTS | facts))
        return card(tmp_path, source_card)

    return made


def front_matter(text: str) -> dict[str, Any]:
    data: dict[str, Any] = ModelCard(text).data.to_dict()
    return data


def test_the_front_matter_of_a_quantized_model(made: Made) -> None:
    assert front_matter(made()) == {
        "license": "apache-2.0",
        "license_link": "https://huggingface.co/Qwen/Qwen3.5-0.8B/blob/main/LICENSE",
        "language": ["en", "no"],
        "library_name": "mlx",
        "pipeline_tag": "text-generation",
        "base_model": "Qwen/Qwen3.5-0.8B",
        "base_model_relation": "quantized",
        "tags": ["mlx", "qwen3_5", "4-bit", "mtp"],
    }


def test_a_float_model_is_no_quantization_of_its_base(made: Made) -> None:
    data = front_matter(made(config={"quantization": None}, recipe=None))
    assert (data["base_model"], data.get("base_model_relation")) == ("Qwen/Qwen3.5-0.8B", None)
    assert data["tags"] == ["mlx", "qwen3_5", "mtp"]


def test_of_a_local_source_no_base_is_named(made: Made) -> None:
    data = front_matter(made(source=LOCAL))
    assert {"base_model", "base_model_relation"} & data.keys() == set()


def test_with_the_vision_tower_it_is_for_pictures(made: Made) -> None:
    assert front_matter(made(config={"vision_config": {}}))["pipeline_tag"] == "image-text-to-text"


@pytest.mark.parametrize(
    ("config", "kept", "tags"),
    [
        pytest.param({"model_type": "qwen3_5_moe"}, True, ["mlx", "qwen3_5_moe", "4-bit", "mtp"], id="experts"),
        pytest.param({}, False, ["mlx", "qwen3_5", "4-bit"], id="without_mtp"),
        pytest.param(
            {"quantization": {"group_size": 32, "bits": 4, "mode": "mxfp4"}},
            True,
            ["mlx", "qwen3_5", "4-bit", "mxfp4", "mtp"],
            id="mxfp4",
        ),
        pytest.param({"quantization": {"group_size": 64, "bits": 8}}, False, ["mlx", "qwen3_5", "8-bit"], id="no_mode"),
    ],
)
def test_tags(made: Made, config: dict[str, Any], kept: bool, tags: list[str]) -> None:
    assert front_matter(made(config=config, kept={"mtp": kept, "vision": False}))["tags"] == tags


def test_a_licence_of_its_own_is_copied_whole(made: Made) -> None:
    source = "---\nlicense: other\nlicense_name: tongyi\nlicense_link: LICENSE.md\n---\n"
    data = front_matter(made(source))
    assert (data["license"], data["license_name"]) == ("other", "tongyi")
    # The file is not there any more, but where it came from.
    assert data["license_link"] == "https://huggingface.co/Qwen/Qwen3.5-0.8B/blob/main/LICENSE.md"


@pytest.mark.parametrize("source_card", [None, "", "# A model\n", "---\n---\n# A model\n"])
def test_a_source_without_front_matter_gives_no_licence(made: Made, source_card: str | None) -> None:
    assert {key for key in front_matter(made(source_card)) if key.startswith(("license", "language"))} == set()


@pytest.mark.parametrize("block", ["license: [apache-2.0", "- a list", "just words"])
def test_a_front_matter_that_cannot_be_read_is_told(made: Made, block: str) -> None:
    with pytest.warns(UserWarning, match=r"front matter that cannot be read; name the licence"):
        text = made(f"---\n{block}\n---\n")
    assert "license" not in front_matter(text)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"config": {"quantization": None}, "recipe": None},
        {"config": {"vision_config": {}}},
        {"source": LOCAL},
        {"source_card": None},
        {"source_card": "---\nlicense: other\nlicense_name: x\nlicense_link: LICENSE\n---\n"},
    ],
)
def test_the_hub_takes_the_front_matter(made: Made, changes: dict[str, Any]) -> None:
    assert wrong_in_card(made(**changes)) == []


@pytest.mark.parametrize(
    "text",
    [
        "python -m qwen_mlx.convert --hf-path Qwen/Qwen3.5-0.8B -q\n",
        "# Qwen3.5-0.8B for MLX, 4-bit\n",
        "[Qwen/Qwen3.5-0.8B](https://huggingface.co/Qwen/Qwen3.5-0.8B) at revision c0ffee",
        "qwen_mlx 0.1.0",
        "| source | as released |",
        "| weights | 4-bit affine, groups of 64, recipe q4 |",
        "| bits per weight | 4.71 |",
        "| size | 503,123,456 bytes |",
        "| MTP head | kept |",
        "| vision tower | left out |",
    ],
)
def test_it_says_what_it_is_and_how_it_was_made(made: Made, text: str) -> None:
    assert text in made()


def test_of_a_float_model_the_dtype_is_told(made: Made) -> None:
    text = made(config={"quantization": None}, recipe=None)
    assert "| weights | bfloat16 |" in text
    assert "for MLX, bfloat16\n" in text


def test_a_local_source_is_a_folder(made: Made) -> None:
    text = made(source=LOCAL)
    assert "from the folder my-model.\n" in text
    assert "huggingface.co/my-model" not in text


@pytest.mark.parametrize(
    "line",
    [
        f"2,048 tokens of text (built-in sample, SHA-256 {'ab' * 32})",
        "| perplexity | 9.0567 | 9.1234 |",
        "| likeliest token is the source's (top-1 agreement) | | 97.12% |",
        "| KL divergence from the source, mean (nats) | | 0.0123 |",
        "| KL divergence, 99.9th percentile (nats) | | 0.234 |",
        "| MTP head foresees the model's token | 62.34% | 61.23% |",
    ],
)
def test_the_proof(made: Made, line: str) -> None:
    text = made()
    assert line in text
    assert "not verified" not in text


def test_a_head_that_one_side_lacks_is_a_dash(made: Made) -> None:
    assert "| 62.34% | – |" in made(proof=PROOF | {"mtp_agreement": None})


def test_without_a_head_there_is_no_line_of_it(made: Made) -> None:
    assert "MTP head foresees" not in made(proof=PROOF | {"mtp_agreement": None, "mtp_agreement_source": None})


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("--no-verify was given.", "**not verified**: --no-verify was given.\n"),
        (None, "**not verified**: it was not compared with its source.\n"),
    ],
)
def test_not_verified_and_why(made: Made, reason: str | None, said: str) -> None:
    text = made(verified=False, reason=reason, proof=None)
    assert said in text
    assert "perplexity" not in text


def test_a_bad_result_shows_its_numbers_too(made: Made) -> None:
    text = made(verified=False, reason="the mean KL of 3 nats is too much")
    assert "**not verified**: the mean KL of 3 nats is too much.\n" in text
    assert "| perplexity | 9.0567 | 9.1234 |" in text


@pytest.mark.parametrize("name", ["config.json", "qwen_mlx.json"])
def test_a_folder_without_its_facts(made: Made, tmp_path: Path, name: str) -> None:
    made()
    (tmp_path / name).unlink()
    with pytest.raises(CheckpointError, match=f"it has no {name}"):
        card(tmp_path, None)


def test_only_a_model_that_sees_is_for_mlx_vlm(made: Made) -> None:
    assert "mlx_vlm" not in made()
    assert f"python -m mlx_vlm.generate --model {OWN_ID} --image" in made(config={"vision_config": {}})


def test_its_python_runs(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", made(), re.DOTALL)
    exec(code.replace(OWN_ID, "demo").replace("300", "8"), {})
    assert capsys.readouterr().out.strip()


def test_its_command_runs(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = re.findall(r"^python -m qwen_mlx.generate (.*)$", made(), re.MULTILINE)
    command = importlib.import_module("qwen_mlx.generate")
    command.main([*shlex.split(line.replace(OWN_ID, "demo")), "--max-tokens", "8"])
    assert capsys.readouterr().out.strip()


def test_the_flags_for_mlx_lm_are_its_own(made: Made) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mlx_lm.generate import setup_arg_parser

    (line,) = re.findall(r"^python -m mlx_lm generate (.*)$", made(), re.MULTILINE)
    args = setup_arg_parser().parse_args(shlex.split(line))
    assert (args.model, args.prompt) == (OWN_ID, "Why is the sky blue?")
