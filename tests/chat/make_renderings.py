"""What transformers makes of the conversations with Qwen3.5's released templates. Writes data/renderings.json.

`python -m tests.chat.make_renderings LARGE SMALL`, by hand; needs transformers. LARGE is the path of the
chat_template.jinja of a released checkpoint that thinks by default (4B and larger), SMALL of one that does not (0.8B,
2B); the project holds neither. Arguments of tool calls that are JSON text are parsed before: transformers takes objects
only. It does not know our renderer.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import tokenizers
import transformers
from jinja2 import TemplateError

DATA = Path(__file__).parent / "data"
ABOUT = (
    "What transformers makes of conversations.json with two released templates of Qwen3.5, made by make_renderings.py. "
    "The texts hold the templates' fixed sentences about tools; Qwen3.5 is under the Apache License 2.0."
)


def with_objects(call: dict[str, Any]) -> dict[str, Any]:
    """The call with its arguments as an object; text that is no JSON stays, for transformers to refuse."""
    if "function" in call:
        return {**call, "function": with_objects(call["function"])}
    if not isinstance(call.get("arguments"), str):
        return call
    try:
        return {**call, "arguments": json.loads(call["arguments"])}
    except json.JSONDecodeError:
        return call


def prepared(message: dict[str, Any]) -> dict[str, Any]:
    calls = message.get("tool_calls")
    if not calls:
        return message
    return {**message, "tool_calls": [call if isinstance(call, str) else with_objects(call) for call in calls]}


def rendered(template: str, case: dict[str, Any], tools: dict[str, Any]) -> str:
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE()))
    thinking = {"enable_thinking": case["thinking"]} if "thinking" in case else {}
    return tokenizer.apply_chat_template(
        [prepared(message) for message in case["messages"]],
        tools=[tools[name] for name in case["tools"]] if "tools" in case else None,
        chat_template=template,
        add_generation_prompt=case.get("add_generation_prompt", True),
        tokenize=False,
        **thinking,
    )


def main(large: Path, small: Path) -> None:
    given = json.loads((DATA / "conversations.json").read_text(encoding="utf-8"))
    templates, renderings = {}, {}
    for size, path in (("large", large), ("small", small)):
        data = path.read_bytes()
        template = data.decode("utf-8")
        templates[size] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        renderings[size] = {
            name: rendered(template, case, given["tools"]) for name, case in given["conversations"].items()
        }
        for name, case in given["refused"].items():
            try:
                rendered(template, case, given["tools"])
            except (TemplateError, TypeError, ValueError):
                renderings[size][name] = None
            else:
                raise SystemExit(f"{name} is not refused.")
    source = {"about": ABOUT, "transformers": transformers.__version__, "templates": templates}
    text = json.dumps({**source, "renderings": renderings}, indent=1, ensure_ascii=False)
    (DATA / "renderings.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="What transformers makes of the conversations.")
    parser.add_argument("large", type=Path, help="chat_template.jinja of a checkpoint of 4B parameters or more")
    parser.add_argument("small", type=Path, help="chat_template.jinja of 0.8B or 2B")
    main(**vars(parser.parse_args()))
