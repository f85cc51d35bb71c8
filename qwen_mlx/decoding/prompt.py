"""What is asked for, as token ids that the model can read.

In: messages, text, or ids. Out: ids, and how many may follow. Knows nothing of what the model answers.
"""

import math
import operator
import reprlib
import warnings
from collections.abc import Mapping, Sequence, Set
from typing import Any, cast

from qwen_mlx.chat.template import render
from qwen_mlx.chat.tools import Tools
from qwen_mlx.config import TextConfig
from qwen_mlx.errors import PromptError, TokenizerError
from qwen_mlx.tokenizer import Tokenizer

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]


def prompt_tokens(tokenizer: Tokenizer, prompt: Prompt, thinking: bool | None, tools: Tools = ()) -> list[int]:
    """The ids of `prompt`; errors of kind and template as `stream_generate` has them."""
    if not isinstance(prompt, str) and isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], Mapping):
        messages = cast(Sequence[Mapping[str, Any]], prompt)
        names = tokenizer.special_tokens
        text = render(tokenizer.chat_template, messages, tools=tools or None, thinking=thinking, special_tokens=names)
        return tokenizer.encode(text)
    if thinking is not None:
        raise ValueError("thinking is a switch of the chat template, and only messages go through it: leave it out.")
    return tokenizer.encode(prompt) if isinstance(prompt, str) else _token_ids(prompt)


def _token_ids(prompt: Any) -> list[int]:
    try:
        if not isinstance(prompt, (bytes, bytearray, Mapping, Set)):
            return [operator.index(i) for i in prompt]
    except TypeError:
        pass
    raise TypeError(f"prompt must be text, a list of token ids or a list of messages, not {reprlib.repr(prompt)}.")


def room_behind(config: TextConfig, prompt: int) -> int | None:
    """Tokens that an answer may have before the positions end; None, with a warning, where the prompt goes beyond."""
    length = config.context_length
    if prompt < length:
        return length - prompt
    yarn = config.rope_parameters.yarn
    native = yarn.original_max_position_embeddings if yarn else length
    warnings.warn(
        f"The prompt has {prompt} tokens, and the model was made for {length}, the answer included: beyond that it may "
        f'be poor. Shorten the prompt, or give rope_parameters in config.json "rope_type": "yarn", "factor": '
        f'{math.ceil((prompt + 1) / native)}.0, "original_max_position_embeddings": {native}.',
        stacklevel=4,
    )
    return None


def check_tokens(config: TextConfig, tokenizer: Tokenizer, tokens: Sequence[int]) -> None:
    """PromptError for no tokens, TokenizerError for a tokenizer of a larger model, ValueError for an id beyond it."""
    if not tokens:
        raise PromptError("The prompt is empty; give at least one word.")
    if tokenizer.vocab_size > config.vocab_size:
        raise TokenizerError(
            f"The tokenizer has {tokenizer.vocab_size} tokens and the model only {config.vocab_size}: "
            "they belong to different models."
        )
    if wrong := next((i for i in tokens if not 0 <= i < config.vocab_size), None):
        raise ValueError(f"prompt has token id {wrong}, but ids run from 0 to {config.vocab_size - 1}.")
