"""The walk: messages -> prompt text -> tokens -> logits -> token -> text, one function that yields.

`python -m qwen_mlx.generate --model demo --prompt "Once upon a time"` is its command.
"""

if __name__ == "__main__":  # before the imports, which take a while: Ctrl-C among them is answered as it is later
    import sys

    from qwen_mlx.cli import run

    def _imported() -> None:
        from qwen_mlx.generate import main

        main()

    sys.exit(run(_imported))

import argparse
import json
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from qwen_mlx.cache.prefix import PrefixStore
from qwen_mlx.chat.template import CUT, render
from qwen_mlx.chat.tools import Tools
from qwen_mlx.cli import Parser, Progress, read_prompt
from qwen_mlx.decoding.asked import asked
from qwen_mlx.decoding.autoregressive import decode
from qwen_mlx.decoding.drafting import drafting
from qwen_mlx.decoding.memory import device_limits
from qwen_mlx.decoding.preflight import STEP_SIZES, check_memory
from qwen_mlx.decoding.prompt import Prompt
from qwen_mlx.decoding.prompt_file import load_prompt_cache
from qwen_mlx.decoding.reuse import PromptCache, Reuse, places_to_keep
from qwen_mlx.decoding.sampling import SamplingParams
from qwen_mlx.decoding.speculative import decode_with_drafts
from qwen_mlx.errors import PromptError
from qwen_mlx.flags import (
    DRAFTING,
    MEMORY,
    THINKING,
    add_drafting,
    add_memory,
    add_model,
    add_sampling,
    add_thinking,
    sampling_of,
)
from qwen_mlx.load import load
from qwen_mlx.model.qwen import Qwen
from qwen_mlx.tokenizer import Tokenizer


@dataclass
class GenerationResponse:
    """What one token brought. Rates are tokens a second, times seconds, memory gigabytes."""

    text: str  # what may be shown now; empty while a character or a stop string may still be open
    token: int
    logprobs: mx.array  # [V] float32, log softmax of the raw logits; not computed before it is looked at
    from_draft: bool
    prompt_tokens: int
    prompt_tps: float
    generation_tokens: int
    generation_tps: float
    peak_memory: float
    time_to_first_token: float
    draft_tokens: int = 0  # of those generated so far, how many were drafts that stood
    cached_tokens: int = 0  # of the prompt, those that were not computed again
    reuse: str | None = None  # with a prefix store, in words: what it knew, and where the prompt parts from it
    finish_reason: str | None = None  # on the last: "stop" or "length"


def stream_generate(
    model: Qwen,
    tokenizer: Tokenizer,
    prompt: Prompt,
    params: SamplingParams | None = None,
    *,
    preset: str | None = None,
    thinking: bool | None = None,
    tools: Tools = (),
    json_schema: Mapping[str, Any] | None = None,
    prefill_step_size: int | None = None,
    kv_bits: int | None = None,
    force: bool = False,
    prefix_store: PrefixStore | None = None,
    prompt_cache: PromptCache | None = None,
    speculate: str = "auto",
    num_draft_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    **sampling: Any,
) -> Generator[GenerationResponse, None, None]:
    """Answer `prompt`: messages (through the chat template), text as it stands, or token ids.

    `params` default to the checkpoint's recommendation, or to the model card's for a use, `preset` ("general", "code",
    "reasoning"); single fields may be given by keyword (`temperature=0.7`).
    `thinking` switches the template's thinking on or off; None leaves it as the checkpoint has it. The template tells
    the model of `tools`, functions in OpenAI's form; in other prompts they are to be already. With a `json_schema` the
    answer is JSON of that schema, or calls `tools`, behind what is thought; it is whole unless `max_tokens` or a stop
    string ends it.

    `progress(done, total)` follows the prompt, which is read `prefill_step_size` tokens at a time, None leaving that to
    the memory there is. `kv_bits` (4 or 8) quantizes keys and values, those of the full-attention layers alone; on
    Metal a token is then not decoded through the compiled graph. The texts of all responses make up the answer.

    What `prefix_store` has of the prompt's beginning is not computed again, and what is new goes into it.
    `prompt_cache` holds the beginning already, and goes on: afterwards it holds the answer as well.

    `speculate` ("auto", "mtp", "ngram", "off") lets up to `num_draft_tokens` be drafted and verified at once where that
    is faster. The answer has the same distribution, and at temperature 0 is the same but for near ties: see `drafting`.

    A prompt of more tokens than the model's positions were made for is answered, with a warning; what bounds it is
    memory: MemoryLimitError where a count from the model's sizes says that both do not fit, unless `force`.

    Raises PromptError for a prompt that is empty, not Unicode, of messages without role or content, or refused by the
    template, and for a `preset` that the card lacks; SchemaError for a schema that cannot be kept to; CheckpointError
    for weights that are not numbers and heads that cannot be quantized; TokenizerError for a tokenizer of another
    model; ValueError for a parameter out of range, `thinking` without messages or one that is no bool, a store of
    another model, a prompt that does not begin as `prompt_cache` does, both of `params` and `preset`; TypeError for a
    prompt of another kind and for an unknown keyword.
    """
    start = first = time.perf_counter()
    answer = asked(
        model,
        tokenizer,
        prompt,
        params,
        preset=preset,
        thinking=thinking,
        tools=tools,
        json_schema=json_schema,
        sampling=sampling,
    )
    tokens, sampler, count = answer.tokens, answer.sampler, answer.count
    drafts, drafted = drafting(model, tokens, sampler.params, speculate, num_draft_tokens), 0
    reuse = Reuse(model, tokens, prompt_cache, prefix_store, kv_bits=kv_bits)
    plan = check_memory(
        model,
        len(tokens),
        count,
        step_size=prefill_step_size,
        kv_bits=kv_bits,
        force=force,
        held=reuse.cache.nbytes,
        store=prefix_store,
        places=len(places_to_keep(tokenizer, tokens, 0, STEP_SIZES[-1])) + 1 if prefix_store else 0,
        head=drafts.head if drafts else None,
    )
    with device_limits(), reuse:
        mx.reset_peak_memory()
        seen = drafts.seen if drafts else None
        logits = reuse.read(model, tokenizer, step_size=plan.step_size, seen=seen, progress=progress)
        if drafts is None:
            decoded = decode(model, logits, reuse.cache, sampler, count=count)
        else:
            decoded = decode_with_drafts(model, logits, reuse.cache, sampler, count=count, drafting=drafts)
        with closing(decoded):
            for n, (token, row, from_draft) in enumerate(decoded, start=1):
                now = time.perf_counter()
                if n == 1:
                    first = now
                reuse.tokens.append(token)
                drafted += from_draft
                row = row.astype(mx.float32)
                text, finish = answer.text.add(token)
                if finish:  # before the last is told: whoever has it may go on from there
                    decoded.close()
                    reuse.keep()
                yield GenerationResponse(
                    text=text,
                    token=token,
                    logprobs=row - mx.logsumexp(row),
                    from_draft=from_draft,
                    prompt_tokens=len(tokens),
                    prompt_tps=(len(tokens) - reuse.cached_tokens) / (first - start),
                    generation_tokens=n,
                    generation_tps=(n - 1) / (now - first) if n > 1 else 0.0,
                    peak_memory=mx.get_peak_memory() / 1e9,
                    time_to_first_token=first - start,
                    draft_tokens=drafted,
                    cached_tokens=reuse.cached_tokens,
                    reuse=reuse.in_words,
                    finish_reason=finish,
                )
                if finish:
                    return


def generate(
    model: Qwen, tokenizer: Tokenizer, prompt: Prompt, params: SamplingParams | None = None, **options: Any
) -> str:
    """The whole answer to `prompt` as text; arguments and errors are those of `stream_generate`."""
    return "".join(r.text for r in stream_generate(model, tokenizer, prompt, params, **options))


def _behind(tokenizer: Tokenizer, prompt: str, *, raw: bool, thinking: bool | None) -> list[int]:
    """The tokens of `prompt` and what the template puts behind it, where a prompt file has the message's beginning."""
    if raw:
        return tokenizer.encode(prompt)
    messages = [{"role": "user", "content": CUT + prompt}]
    text = render(tokenizer.chat_template, messages, thinking=thinking, special_tokens=tokenizer.special_tokens)
    return tokenizer.encode(text.partition(CUT)[2])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = _parser()
    args = parser.parse_args(arguments)
    if args.prompt_cache_file is not None and args.system_prompt is not None:
        parser.error("--system-prompt stands before all else, in the prompt file: give it to qwen-mlx cache_prompt")
    given = sampling_of(parser, args)
    thinking = THINKING[args.thinking]
    if args.raw and (args.system_prompt is not None or thinking is not None):
        parser.error("--system-prompt and --thinking belong to the chat template, which --raw leaves out")
    prompt = read_prompt(args.prompt)
    if not prompt.strip():
        raise PromptError("The prompt is empty; give at least one word.")
    messages = [{"role": "system", "content": args.system_prompt}] if args.system_prompt else []
    messages.append({"role": "user", "content": prompt})
    pieces: list[str] = []
    last: GenerationResponse | None = None
    start, loaded = time.perf_counter(), 0.0
    try:
        model, tokenizer = load(args.model, revision=args.revision, dtype=args.dtype)
        loaded = time.perf_counter() - start
        if tokenizer.chat_template is None and not args.raw:
            raise PromptError("The model has no chat template; give --raw to continue the prompt as it stands.")
        options = {name: getattr(args, name) for name in MEMORY + DRAFTING}
        request: Prompt = prompt if args.raw else messages
        if args.prompt_cache_file is not None:
            known = load_prompt_cache(args.prompt_cache_file, model, tokenizer, kv_bits=args.kv_bits)
            request = known.tokens + _behind(tokenizer, prompt, raw=args.raw, thinking=thinking)
            options |= {"prompt_cache": known}
        elif not args.raw:
            options |= {"thinking": thinking}
        with Progress("Prompt") as progress:
            options |= {"progress": progress.update}
            for last in stream_generate(model, tokenizer, request, **options, **given):
                pieces.append(last.text)
                if not args.json:
                    print(last.text, end="", flush=True)
    except KeyboardInterrupt:
        _close(args, "".join(pieces), last, loaded)
        raise
    _close(args, "".join(pieces), last, loaded)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="qwen-mlx generate", description="Write a text with a Qwen3.5 model.")
    add = parser.add_argument
    add_model(parser)
    add("--prompt", "-p", help='the prompt; "-" or nothing reads it from stdin, which is left alone else')
    add("--system-prompt", help="instructions that go before the prompt")
    add("--raw", action="store_true", help="continue the prompt as it stands, without the chat template")
    add_thinking(parser)
    add_sampling(parser)
    add("--stop", action="append", help="end before this text; may be given several times")
    add_memory(parser)
    add_drafting(parser)
    add("--prompt-cache-file", help="file of qwen-mlx cache_prompt; the prompt goes on where its text ends")
    add("--json", action="store_true", help="print one JSON object at the end instead of the text")
    add("--verbose", action="store_true", help="say on stderr how long it took")
    return parser


def _close(args: argparse.Namespace, text: str, last: GenerationResponse | None, loaded: float) -> None:
    """End the line, or print the JSON object; then the closing lines of --verbose."""
    if args.json:
        print(json.dumps({"model": args.model, "text": text, **_report(last, loaded)}), flush=True)
    elif last:
        print(flush=True)
    if args.verbose and last:
        print(_summary(last), file=sys.stderr)


def _report(last: GenerationResponse | None, loaded: float) -> dict[str, Any]:
    """What --json says beside the text; null where an interruption came before the first token."""
    if last is None:
        return {"finish_reason": "interrupted", "usage": None, "timings": None, "peak_memory_gb": None}
    return {
        "finish_reason": last.finish_reason or "interrupted",
        "usage": {
            "prompt_tokens": last.prompt_tokens,
            "completion_tokens": last.generation_tokens,
            "prompt_tokens_details": {"cached_tokens": last.cached_tokens},
            "completion_tokens_details": {"accepted_prediction_tokens": last.draft_tokens},
        },
        "timings": {
            "load_s": round(loaded, 4),
            "time_to_first_token_s": round(last.time_to_first_token, 4),
            "prompt_tps": round(last.prompt_tps, 3),
            "generation_tps": round(last.generation_tps, 3),
        },
        "peak_memory_gb": round(last.peak_memory, 3),
    }


def _summary(last: GenerationResponse) -> str:
    """The closing lines of mlx-lm, whose wording people parse, and the time to the first token."""
    return (
        f"{'=' * 10}\n"
        f"Prompt: {last.prompt_tokens} tokens, {last.prompt_tps:.3f} tokens-per-sec\n"
        f"Generation: {last.generation_tokens} tokens, {last.generation_tps:.3f} tokens-per-sec\n"
        f"Peak memory: {last.peak_memory:.3f} GB\n"
        f"Time to first token: {last.time_to_first_token:.3f} s\n"
        f"Cached: {last.cached_tokens} of {last.prompt_tokens} prompt tokens\n"
        f"Drafts: {last.draft_tokens} of {last.generation_tokens} tokens were drafted and stood"
    )
