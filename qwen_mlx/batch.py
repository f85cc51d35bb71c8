"""Several prompts answered at once: a step of the model reads its weights for all of them.

answers = batch_generate(model, tokenizer, ["Once upon a time", "One day"], max_tokens=100)
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from qwen_mlx.chat.tools import Tools
from qwen_mlx.decoding.asked import asked
from qwen_mlx.decoding.batch import decode_batch
from qwen_mlx.decoding.memory import device_limits
from qwen_mlx.decoding.preflight import check_memory
from qwen_mlx.decoding.prompt import Prompt
from qwen_mlx.decoding.sampling import SamplingParams
from qwen_mlx.model.qwen import Qwen
from qwen_mlx.tokenizer import Tokenizer


@dataclass
class BatchAnswer:
    """What was written to one of the prompts."""

    prompt_tokens: int
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None  # "stop" or "length"


def batch_generate(
    model: Qwen,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    params: SamplingParams | None = None,
    *,
    batch_size: int = 8,
    preset: str | None = None,
    thinking: bool | None = None,
    tools: Tools = (),
    json_schema: Mapping[str, Any] | None = None,
    prefill_step_size: int | None = None,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
    **sampling: Any,
) -> list[BatchAnswer]:
    """Answer each of `prompts`, at most `batch_size` at a time: where one is finished, the next takes its place.

    Each answer is the one that its prompt gets alone, given a seed or temperature 0, but for near ties: sums are made
    in another order. The other arguments are those of `stream_generate`. `progress(done, total)` follows the answers,
    which are lost if it is interrupted.

    Raises what `stream_generate` does, MemoryLimitError for `batch_size` texts as long as the longest, TypeError for
    `prompts` that are one text, and ValueError for a `batch_size` that is not an integer of at least 1.
    """
    if isinstance(prompts, str):
        raise TypeError("prompts must be a list of prompts, not one text.")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be an integer, at least 1, not {batch_size!r}.")
    ready = [
        asked(
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
        for prompt in prompts
    ]
    answers, left = [BatchAnswer(len(each.tokens)) for each in ready], len(ready)
    if not ready:
        return answers
    plan = check_memory(
        model,
        max(len(each.tokens) for each in ready),
        max(each.count for each in ready),
        step_size=prefill_step_size,
        force=force,
        rows=min(batch_size, len(ready)),
    )
    texts = [each.text for each in ready]
    ready.reverse()
    waiting = (ready.pop() for _ in texts)  # a sampler with penalties takes as much memory as the vocabulary
    steps = decode_batch(
        model, ((each.tokens, each.sampler) for each in waiting), size=batch_size, step_size=plan.step_size
    )
    with device_limits(), closing(steps):
        number, token = next(steps)
        while True:
            answer = answers[number]
            text, answer.finish_reason = texts[number].add(token)
            answer.text += text
            answer.tokens.append(token)
            if answer.finish_reason:
                left -= 1
                if progress:
                    progress(len(answers) - left, len(answers))
            if left == 0:
                return answers
            number, token = steps.send(answer.finish_reason is None)
