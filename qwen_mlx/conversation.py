"""A conversation: messages in OpenAI's form, each answer in parts as it is written, tools run in between.

    chat = Chat(model, tokenizer, system="Be brief.")
    for part in chat.send("Hello"): ...

Every answer renders all messages anew; what was computed for earlier ones is found again in a `PrefixStore`. Knows
nothing of terminals.
"""

import json
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen_mlx.cache.file import read_note
from qwen_mlx.cache.prefix import PrefixStore
from qwen_mlx.chat.loops import repeats
from qwen_mlx.chat.reply import Part, ReplySplitter, Thinking, leaves_thinking_open
from qwen_mlx.chat.template import render
from qwen_mlx.chat.tools import ToolCall, schema_of, to_openai
from qwen_mlx.decoding.asked import recommended_params
from qwen_mlx.decoding.prefill import prefill
from qwen_mlx.decoding.prompt_file import load_prompt_cache, save_prompt_cache
from qwen_mlx.decoding.reuse import PromptCache
from qwen_mlx.decoding.sampling import SamplingParams
from qwen_mlx.errors import PromptCacheError
from qwen_mlx.generate import GenerationResponse, stream_generate
from qwen_mlx.model.qwen import Qwen
from qwen_mlx.tokenizer import Tokenizer

ROUNDS = 8
"""Answers in a row that may call tools before the conversation waits for its user again."""
END_OF_THOUGHT = "\n</think>\n\n"


@dataclass(frozen=True)
class Tool:
    """What the model may call: `schema` in OpenAI's form, and what runs it with the arguments by name."""

    schema: Mapping[str, Any]
    run: Callable[..., Any]

    @property
    def name(self) -> str:
        return str(self.schema["function"]["name"])


@dataclass(frozen=True)
class ToolResult:
    """What a tool gave back, as the model reads it."""

    call: ToolCall
    text: str


@dataclass(frozen=True)
class Cut:
    """Thinking was ended before the model ended it: it had used up its budget, or went in circles."""

    reason: str


Event = Part | ToolResult | Cut


@dataclass
class _Answer:
    """The message that the parts of an answer make up."""

    thought: str = ""
    content: str = ""
    calls: list[ToolCall] = field(default_factory=list)

    def add(self, part: Part) -> None:
        if isinstance(part, Thinking):
            self.thought += part.text
        elif isinstance(part, ToolCall):
            self.calls.append(part)
        else:
            self.content += part.text

    def message(self, number: int) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": self.content, "reasoning_content": self.thought}
        if self.calls:
            message["tool_calls"] = [to_openai(call, f"call_{number}_{i}") for i, call in enumerate(self.calls)]
        return message


class Chat:
    """A conversation with `model`; `messages` may be read, and set between two answers.

    `tools` are typed functions with docstrings (`schema_of`), or a `Tool` each. `approve(call)` is asked before one is
    run, and None runs all. `thinking` as in `stream_generate`; after `thinking_budget` tokens of it, or when it goes in
    circles and `loop_guard` is set, the end of the thought is written for the model. `options` go to
    `stream_generate`: sampling, `json_schema`, speculation, memory.

    Raises ValueError for a function that is no tool, and for two tools of one name.
    """

    def __init__(
        self,
        model: Qwen,
        tokenizer: Tokenizer,
        *,
        system: str | None = None,
        tools: Sequence[Callable[..., Any] | Tool] = (),
        approve: Callable[[ToolCall], bool] | None = None,
        thinking: bool | None = None,
        thinking_budget: int | None = None,
        loop_guard: bool = True,
        **options: Any,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
        self.thinking, self.thinking_budget, self.loop_guard = thinking, thinking_budget, loop_guard
        self.last: GenerationResponse | None = None
        """Of the answer that was written last, where one was."""
        self.options = {"prefix_store": PrefixStore(model)} | options
        self._approve = approve
        listed = [tool if isinstance(tool, Tool) else Tool(schema_of(tool), tool) for tool in tools]
        self._tools = {tool.name: tool for tool in listed}
        if len(self._tools) < len(listed):
            raise ValueError(f"Two tools have one name; those given are {', '.join(tool.name for tool in listed)}.")

    def send(self, text: str) -> Generator[Event, None, None]:
        """Say `text`; yields what comes back, thought and content piece by piece, tool calls and their results.

        Closed before its end, the conversation keeps what was yielded. Errors are those of `stream_generate`; the
        message is then taken back.
        """
        before = len(self.messages)
        self.messages.append({"role": "user", "content": text})
        try:
            for _ in range(ROUNDS):
                calls = yield from self._answer()
                for call in calls:
                    result = self._run(call)
                    self.messages.append({"role": "tool", "content": result})
                    yield ToolResult(call, result)
                if not calls:
                    return
        except Exception:
            del self.messages[before:]
            raise

    def rewind_turn(self) -> str:
        """Take back the last message of the user and all that came after; returns its text.

        Raises ValueError where there is none.
        """
        place = next((i for i in reversed(range(len(self.messages))) if self.messages[i]["role"] == "user"), None)
        if place is None:
            raise ValueError("There is no turn to take back: nothing has been said yet.")
        text = str(self.messages[place]["content"])
        del self.messages[place:]
        return text

    def save(self, path: str | Path) -> None:
        """Write the messages and what is computed of them to a prompt file, for `load` to go on from.

        Raises PromptError where nothing was said; other errors as `save_prompt_cache` has them.
        """
        # As the next prompt will begin: a template writes answers differently once another message follows.
        tokens = self.tokenizer.encode(self._rendered([*self.messages, {"role": "user", "content": ""}]))
        cache = self.model.make_cache(kv_bits=self.options.get("kv_bits"))
        if not self.options["prefix_store"].restore(tokens, cache).cached:
            prefill(self.model, tokens[:1], cache, step_size=1)  # a file holds something
        note = json.dumps({"messages": self.messages}, ensure_ascii=False)
        known = PromptCache(tokens[: cache.offset], cache, self.model)
        save_prompt_cache(path, known, self.model, self.tokenizer, note=note)

    def load(self, path: str | Path) -> None:
        """Be the conversation that `save` wrote; what was computed of it is not computed again.

        Raises PromptCacheError for a file that holds none, and as `load_prompt_cache` has it.
        """
        known = load_prompt_cache(path, self.model, self.tokenizer, kv_bits=self.options.get("kv_bits"))
        try:
            self.messages = json.loads(read_note(path))["messages"]
        except (ValueError, KeyError):
            raise PromptCacheError(
                f"{path} holds a prompt, and no conversation; take a file that chat wrote."
            ) from None
        known.cache.checkpoint()
        self.options["prefix_store"].add(known.tokens, known.cache)

    def prompt(self) -> str:
        """What the model reads for its next answer."""
        return self._rendered(self.messages)

    @property
    def _schemas(self) -> list[Mapping[str, Any]]:
        return [tool.schema for tool in self._tools.values()]

    def _rendered(self, messages: Sequence[Mapping[str, Any]]) -> str:
        return render(
            self.tokenizer.chat_template,
            messages,
            tools=self._schemas or None,
            thinking=self.thinking,
            special_tokens=self.tokenizer.special_tokens,
        )

    def _answer(self) -> Generator[Event, None, list[ToolCall]]:
        """One message of the assistant; returns the tools it calls."""
        prompt, answer = self.prompt(), _Answer()
        thinks = leaves_thinking_open(prompt)
        splitter = ReplySplitter(thinking=thinks, tools=self._schemas)
        ended = False
        try:
            for text in self._written(self.tokenizer.encode(prompt), thinks=thinks):
                if isinstance(text, Cut):
                    yield text
                    continue
                for part in splitter.feed(text):
                    answer.add(part)
                    yield part
            ended = True
        finally:
            rest = splitter.finish() if ended else []
            for part in rest:
                answer.add(part)
            self.messages.append(answer.message(len(self.messages)))
        yield from rest
        return answer.calls

    def _written(self, tokens: list[int], *, thinks: bool) -> Iterator[str | Cut]:
        """The text of an answer as it comes; where a thought is cut off, why, and then its end."""
        options = dict(self.options)
        left = SamplingParams().max_tokens if options.get("max_tokens") is None else options["max_tokens"]
        if options.get("params") is None:  # also where the rest of the answer is asked for without thinking
            preset = options.pop("preset", None)
            options["params"] = recommended_params(self.model, thinking=thinks, preset=preset)
        while True:
            text, new, cut = "", list[int](), None
            options["max_tokens"] = left
            answer = stream_generate(self.model, self.tokenizer, tokens, tools=self._schemas, **options)
            with closing(answer) as responses:
                for response in responses:
                    self.last = response
                    new.append(response.token)
                    text += response.text
                    yield response.text
                    if thinks and "</think>" not in text and (cut := self._why_cut(new)):
                        break
            left -= len(new)
            if cut is None or left < 1:
                return
            tokens, thinks = [*tokens, *new, *self.tokenizer.encode(END_OF_THOUGHT)], False
            yield Cut(cut)
            yield END_OF_THOUGHT

    def _why_cut(self, thought: list[int]) -> str | None:
        if self.thinking_budget is not None and len(thought) >= self.thinking_budget:
            return f"its budget of {self.thinking_budget} tokens is used up"
        if self.loop_guard and repeats(thought):
            return "it went in circles"
        return None

    def _run(self, call: ToolCall) -> str:
        """The result for the model; what goes wrong is told to it as well."""
        tool = self._tools.get(call.name)
        if tool is None:
            return f"Error: there is no tool {call.name}; those there are: {', '.join(self._tools)}."
        if call.unparsed:
            return f"Error: {', '.join(call.unparsed)} not of the type that the tool's schema asks for."
        if self._approve and not self._approve(call):
            return "Error: the user does not allow this call."
        try:
            result = tool.run(**call.arguments)
            return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str)
        except Exception as error:  # whatever a tool raises or gives back, the model is told of it
            return f"Error: {type(error).__name__}: {error}"
