"""`python -m qwen_mlx.cache_prompt`: compute a long beginning once, for `generate --prompt-cache-file` to go on with.

What is cached is an unfinished message of the user, or with --raw an unfinished text.
"""

import argparse
import json
import sys
from collections.abc import Sequence

from qwen_mlx.cache.quantized_kv import BITS
from qwen_mlx.chat.template import CUT, render
from qwen_mlx.cli import Parser, Progress, positive, read_prompt, run
from qwen_mlx.decoding.memory import device_limits
from qwen_mlx.decoding.preflight import check_memory
from qwen_mlx.decoding.prompt_file import save_prompt_cache
from qwen_mlx.decoding.reuse import PromptCache, Reuse
from qwen_mlx.errors import PromptError
from qwen_mlx.hub import DEFAULT_MODEL
from qwen_mlx.load import load
from qwen_mlx.tokenizer import Tokenizer


def main(arguments: Sequence[str] | None = None) -> None:
    parser = _parser()
    args = parser.parse_args(arguments)
    if args.raw and args.system_prompt is not None:
        parser.error("--system-prompt belongs to the chat template, which --raw leaves out")
    prompt = read_prompt(args.prompt)
    model, tokenizer = load(args.model, revision=args.revision, dtype=args.dtype)
    tokens = tokenizer.encode(prompt if args.raw else _unfinished(tokenizer, args.system_prompt, prompt))
    if not prompt.strip() or not tokens:
        raise PromptError("The prompt is empty; give at least one word.")
    text = Reuse(model, tokens, kv_bits=args.kv_bits)
    options = {"step_size": args.prefill_step_size, "kv_bits": args.kv_bits, "force": args.force}
    plan = check_memory(model, len(tokens), 0, **options)
    with device_limits(), Progress("Prompt") as progress:
        text.read(model, tokenizer, step_size=plan.step_size, progress=progress.update)
    save_prompt_cache(args.prompt_cache_file, PromptCache(tokens, text.cache), model, tokenizer)
    told = {"file": args.prompt_cache_file, "tokens": len(tokens), "bytes": text.cache.nbytes}
    print(json.dumps(told) if args.json else f"{args.prompt_cache_file}: {len(tokens)} tokens", flush=True)


def _unfinished(tokenizer: Tokenizer, system: str | None, prompt: str) -> str:
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt + CUT})
    return render(tokenizer.chat_template, messages, special_tokens=tokenizer.special_tokens).partition(CUT)[0]


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="qwen-mlx cache_prompt", description="Compute the beginning of prompts once, into a file.")
    add = parser.add_argument
    add("--model", default=DEFAULT_MODEL, help=f'folder, hub id, or "demo" (default: {DEFAULT_MODEL})')
    add("--revision", help="branch, tag or commit on the hub")
    add("--prompt", "-p", help='the beginning; "-" or nothing reads it from stdin')
    add("--system-prompt", help="instructions that go before it")
    add("--raw", action="store_true", help="a text as it stands, without the chat template")
    add("--prompt-cache-file", required=True, help="where to; a file there is replaced when the new one is complete")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="dtype of the activations")
    add("--prefill-step-size", type=positive, help="tokens read at a time (default: as memory allows)")
    add("--kv-bits", type=int, choices=BITS, help="bits of keys and values, in the full-attention layers only")
    add("--force", action="store_true", help="try a prompt that memory, by the count of its bytes, has no room for")
    add("--json", action="store_true", help="print one JSON object")
    return parser


if __name__ == "__main__":
    sys.exit(run(main))
