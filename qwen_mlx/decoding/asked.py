"""An answer that is asked for, made ready: the tokens of its prompt, what draws the next, and what they are as text."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from qwen_mlx.chat.tools import Tools
from qwen_mlx.config import TextConfig
from qwen_mlx.decoding.constraint import constrain
from qwen_mlx.decoding.prompt import Prompt, check_tokens, prompt_tokens, room_behind
from qwen_mlx.decoding.reply_text import ReplyText
from qwen_mlx.decoding.sampling import Sampler, SamplingParams, default_params
from qwen_mlx.model.qwen import Qwen
from qwen_mlx.tokenizer import Tokenizer


@dataclass
class Asked:
    """`count` is that of the longest answer, in tokens."""

    tokens: list[int]
    count: int
    sampler: Sampler
    text: ReplyText


def asked(
    model: Qwen,
    tokenizer: Tokenizer,
    prompt: Prompt,
    params: SamplingParams | None,
    *,
    preset: str | None,
    thinking: bool | None,
    tools: Tools,
    json_schema: Mapping[str, Any] | None,
    sampling: Mapping[str, Any],
) -> Asked:
    """Arguments and errors are those of `stream_generate`, but what memory has to say."""
    known = [field.name for field in fields(SamplingParams)]
    if unknown := next((name for name in sampling if name not in known), None):
        raise TypeError(f"There is no option {unknown}; those of sampling are {', '.join(known)}.")
    config = model.config.text
    tokens = prompt_tokens(tokenizer, prompt, thinking, tools)
    check_tokens(config, tokenizer, tokens)
    room = room_behind(config, len(tokens))
    is_thinking = _is_thinking(tokenizer, tokens)
    if params is not None and preset is not None:
        raise ValueError("params and preset both say how tokens are drawn: leave one of them out.")
    params = replace(params or recommended_params(model, thinking=is_thinking, preset=preset), **sampling)
    count = params.max_tokens if room is None else min(params.max_tokens, room)
    ends = sorted({*model.config.eos_token_ids, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])})
    form = None
    if json_schema is not None:
        form = constrain(tokenizer, json_schema, tools=tools, ends=ends, thinking=is_thinking)
    sampler = Sampler(
        params, tokens, vocab_size=config.vocab_size, num_real_tokens=tokenizer.vocab_size, constraint=form
    )
    text = ReplyText(tokenizer, ends=ends, stops=params.stop, count=count)
    return Asked(tokens, count, sampler, text)


def _is_thinking(tokenizer: Tokenizer, tokens: list[int]) -> bool:
    """Whether a thought is open at the end of `tokens`."""
    marks = {tokenizer.token_to_id(tag): tag for tag in ("<think>", "</think>", "<|im_start|>")}
    return next((marks[token] == "<think>" for token in reversed(tokens) if token in marks), False)


def recommended_params(model: Qwen, *, thinking: bool, preset: str | None = None) -> SamplingParams:
    """What the checkpoint's generation_config.json asks for, else the model card of its size and mode."""
    small = is_small(model.config.text)
    return default_params(model.config.generation, is_small=small, thinking=thinking, preset=preset)


def is_small(config: TextConfig) -> bool:
    """Whether the model is of the sizes, 0.8B and 2B, that have rows of their own on the model card."""
    return config.moe is None and config.hidden_size <= 2048
