"""README.md of a converted folder: front matter as the hub expects it, what it is, how it was made, how close it is.

In: the folder, with config.json and qwen_mlx.json, and the text of the source's README.md. Out: the text. Measures
nothing and writes nothing.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen_mlx.config import read_json
from qwen_mlx.convert.save import ACCOUNT

# Where it lies is known only to who uploads it, who puts the repository's id in this place.
OWN_ID = "ORG/NAME"
KINDS = {
    "released": "as released",
    "FP8": "an FP8 release",
    "MLX": "an MLX conversion",
    "qwen_mlx": "a conversion by qwen_mlx",
    "GGUF": "a GGUF file",
}


def card(folder: Path, source_card: str | None) -> str:
    """The text of README.md for the conversion in `folder`; `source_card` is that of what it was made from.

    Licence and language are copied from the source's front matter. Raises `CheckpointError` where config.json or
    qwen_mlx.json is missing or no JSON.
    """
    config, facts = read_json(folder / "config.json"), read_json(folder / ACCOUNT)
    parts = [_front_matter(config, facts, source_card), _what_it_is(config, facts), _use(config), _proof(facts)]
    return "\n".join(parts)


def _front_matter(config: Mapping[str, Any], facts: Mapping[str, Any], source_card: str | None) -> str:
    # Late: 0.45 s that only a conversion pays.
    from huggingface_hub import ModelCardData

    source = facts["source"]
    base = {"base_model": source["id"]} if source["hub"] else {}
    if base and "quantization" in config:
        base["base_model_relation"] = "quantized"
    data = ModelCardData(
        **_licence(source_card, source),
        library_name="mlx",
        pipeline_tag="image-text-to-text" if "vision_config" in config else "text-generation",
        tags=_tags(config, facts),
        **base,
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _licence(source_card: str | None, source: Mapping[str, Any]) -> dict[str, Any]:
    """Licence and language out of the source's front matter, as they are written there."""
    import yaml  # type: ignore[import-untyped]
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    block = REGEX_YAML_BLOCK.search(source_card or "")
    try:
        # All values as text: to YAML the language "no" is a boolean.
        data = yaml.load(block[2], Loader=yaml.BaseLoader) if block else {}
    except yaml.YAMLError as error:
        data = str(error)
    if not isinstance(data, dict):
        warnings.warn("The source's README.md has front matter that cannot be read; name the licence.", stacklevel=2)
        return {}
    copied = {key: value for key, value in data.items() if key == "language" or key.startswith("license")}
    link = copied.get("license_link", "https://")
    if source["hub"] and "://" not in link:
        copied["license_link"] = f"https://huggingface.co/{source['id']}/blob/main/{link}"
    return copied


def _tags(config: Mapping[str, Any], facts: Mapping[str, Any]) -> list[str]:
    tags = ["mlx", config["model_type"]]
    if quantization := config.get("quantization"):
        tags.append(f"{quantization['bits']}-bit")
        if (mode := quantization.get("mode", "affine")) != "affine":
            tags.append(mode)
    return tags + ["mtp"] * facts["kept"]["mtp"]


def _what_it_is(config: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    source = facts["source"]
    name = source["id"]
    origin = f"[{name}](https://huggingface.co/{name})" if source["hub"] else f"the folder {name}"
    if source["revision"]:
        origin += f" at revision {source['revision']}"
    form = short = facts["dtype"]
    if found := config.get("quantization"):
        short = f"{found['bits']}-bit"
        form = f"{short} {found.get('mode', 'affine')}, groups of {found['group_size']}"
    if facts["recipe"]:
        form += f", recipe {facts['recipe']}"
    return f"""# {name.split("/")[-1]} for MLX, {short}

A Qwen3.5 model for Apple Silicon, converted by qwen_mlx {facts["qwen_mlx"]} from {origin}.

| | |
|---|---|
| source | {KINDS[source["kind"]]} |
| weights | {form} |
| bits per weight | {facts["bits_per_weight"]:.2f} |
| size | {facts["bytes"]:,} bytes |
| MTP head | {_kept(facts, "mtp")} |
| vision tower | {_kept(facts, "vision")} |

It was made by

```bash
{facts["command"]}
```
"""


def _kept(facts: Mapping[str, Any], part: str) -> str:
    if facts["kept"][part]:
        return "kept"
    return "left out" if part in facts["dropped"] else "none in the source"


def _use(config: Mapping[str, Any]) -> str:
    text = f"""## Use

With qwen_mlx, from the command line

```bash
python -m qwen_mlx.generate --model {OWN_ID} --prompt "Why is the sky blue?"
```

or from Python:

```python
from qwen_mlx import generate, load

model, tokenizer = load("{OWN_ID}")
messages = [{{"role": "user", "content": "Why is the sky blue?"}}]
print(generate(model, tokenizer, messages, max_tokens=300))
```

With mlx-lm:

```bash
python -m mlx_lm generate --model {OWN_ID} --prompt "Why is the sky blue?"
```
"""
    if "vision_config" in config:
        text += f"""
With mlx-vlm, which sees pictures too:

```bash
python -m mlx_vlm.generate --model {OWN_ID} --image picture.jpg --prompt "What is in this picture?"
```
"""
    return text


def _proof(facts: Mapping[str, Any]) -> str:
    proof = facts["proof"]
    text = "## How close it is to its source\n"
    if not facts["verified"]:
        reason = facts["reason"] or "it was not compared with its source"
        text += f"\nThis conversion is **not verified**: {reason.rstrip('.')}.\n"
    if proof is None:
        return text
    text += f"""
Source and conversion read the same {proof["tokens"]:,} tokens of text ({proof["text"]}, SHA-256 {proof["sha256"]}).

| | source | this model |
|---|---:|---:|
| perplexity | {proof["perplexity_source"]:.5g} | {proof["perplexity"]:.5g} |
| likeliest token is the source's (top-1 agreement) | | {_percent(proof["top1_agreement"])} |
| KL divergence from the source, mean (nats) | | {proof["kl_mean"]:.3g} |
| KL divergence, 99.9th percentile (nats) | | {proof["kl_p999"]:.3g} |
"""
    pair = proof["mtp_agreement_source"], proof["mtp_agreement"]
    if pair != (None, None):
        text += f"| MTP head foresees the model's token | {_percent(pair[0])} | {_percent(pair[1])} |\n"
    return text


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.2%}"
