"""`python -m qwen_mlx.cache_prompt`: compute a long beginning once, for `generate --prompt-cache-file` to go on with.

What is cached is an unfinished message of the user, or with --raw an unfinished text.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from qwen_mlx.chat.template import CUT, render
from qwen_mlx.cli import Parser, Progress, read_prompt, run
from qwen_mlx.decoding.memory import device_limits
from qwen_mlx.decoding.preflight import check_memory
from qwen_mlx.decoding.prompt import check_tokens, room_behind
from qwen_mlx.decoding.prompt_file import save_prompt_cache
from qwen_mlx.decoding.reuse import PromptCache, Reuse
from qwen_mlx.errors import PromptCacheError, PromptError
from qwen_mlx.flags import add_memory, add_model
from qwen_mlx.load import load
from qwen_mlx.tokenizer import Tokenizer


def main(arguments: Sequence[str] | None = None) -> None:
    parser = _parser()
    args = parser.parse_args(arguments)
    if args.raw and args.system_prompt is not None:
        parser.error("--system-prompt belongs to the chat template, which --raw leaves out")
    prompt, path = read_prompt(args.prompt), Path(args.prompt_cache_file)
    if not prompt.strip():
        raise PromptError("The prompt is empty; give at least one word.")
    _check_place(path)
    model, tokenizer = load(args.model, revision=args.revision, dtype=args.dtype)
    if tokenizer.chat_template is None and not args.raw:
        raise PromptError("The model has no chat template; give --raw to cache the prompt as it stands.")
    tokens = tokenizer.encode(prompt if args.raw else _unfinished(tokenizer, args.system_prompt, prompt))
    check_tokens(model.config.text, tokenizer, tokens)
    room_behind(model.config.text, len(tokens))
    text = Reuse(model, tokens, kv_bits=args.kv_bits)
    options = {"step_size": args.prefill_step_size, "kv_bits": args.kv_bits, "force": args.force}
    plan = check_memory(model, len(tokens), 0, **options)
    with device_limits(), Progress("Prompt") as progress:
        text.read(model, tokenizer, step_size=plan.step_size, progress=progress.update)
    save_prompt_cache(path, PromptCache(tokens, text.cache, model), model, tokenizer)
    told = {"file": args.prompt_cache_file, "tokens": len(tokens), "bytes": path.stat().st_size}
    print(json.dumps(told) if args.json else f"{args.prompt_cache_file}: {len(tokens)} tokens", flush=True)


def _check_place(path: Path) -> None:
    """PromptCacheError before the prompt is computed, which may take long; a full disk is seen when it is written."""
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise PromptCacheError(
            f"{path} cannot be written: give the name of a file, in a folder that exists and that you may write to."
        )


def _unfinished(tokenizer: Tokenizer, system: str | None, prompt: str) -> str:
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt + CUT})
    text = render(tokenizer.chat_template, messages, special_tokens=tokenizer.special_tokens)
    beginning, cut, _ = text.rpartition(CUT)
    if not cut:
        raise PromptError("The chat template does not write a message as it stands, so none can be cut; give --raw.")
    return beginning


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="qwen-mlx cache_prompt", description="Compute the beginning of prompts once, into a file.")
    add = parser.add_argument
    add_model(parser)
    add("--prompt", "-p", help='the beginning; "-" or nothing reads it from stdin')
    add("--system-prompt", help="instructions that go before it")
    add("--raw", action="store_true", help="a text as it stands, without the chat template")
    add("--prompt-cache-file", required=True, help="where to; a file there is replaced when the new one is complete")
    add_memory(parser)
    add("--json", action="store_true", help="print one JSON object")
    return parser


if __name__ == "__main__":
    sys.exit(run(main))
