"""`python -m qwen_mlx.chat`: a conversation in the terminal.

Reads lines and commands, hands messages to a `Chat`, and shows what comes back. Ctrl-C stops an answer and keeps what
there is of it, Ctrl-D leaves.
"""

import argparse
import importlib.util
import inspect
import json
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from qwen_mlx.chat.tools import ToolCall
from qwen_mlx.cli import Parser, Progress, positive, read_prompt
from qwen_mlx.conversation import Chat, Tool
from qwen_mlx.display import Display
from qwen_mlx.errors import PromptError, QwenMLXError
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
from qwen_mlx.generate import GenerationResponse
from qwen_mlx.load import load
from qwen_mlx.mcp_tools import mcp_tools
from qwen_mlx.terminal import read_message

HELP = """\
/help             this
/reset            forget all but the system message
/undo             take back the last message and its answer
/retry            answer the last message again
/edit TEXT        say TEXT in place of the last message
/system TEXT      the system message from here on; without TEXT none
/thinking WORD    auto, on or off
/thought          the last thought in full
/tokens           what the conversation takes
/save FILE        write the messages, as JSON
/load FILE        go on from there
A line that ends with \\ goes on in the next. Lines that arrive together, pasted ones, are one message. Ctrl-C stops an
answer, Ctrl-D leaves."""


class Repl:
    """The commands, and the answers to what is none."""

    def __init__(self, chat: Chat, display: Display, *, verbose: bool = False) -> None:
        self.chat, self.display, self._verbose = chat, display, verbose
        self.stopped = False
        """Whether Ctrl-C ended the last answer."""
        self._commands: dict[str, Callable[[str], None]] = {
            name.removeprefix("do_"): action for name, action in inspect.getmembers(self, inspect.ismethod)
            if name.startswith("do_")
        }  # fmt: skip

    def handle(self, text: str) -> None:
        """A message, or a command; what is wrong with it is said, and nothing else changes."""
        before = list(self.chat.messages)
        try:
            if not text.startswith("/"):
                self.say(text)
                return
            name, _, rest = text[1:].partition(" ")
            if name not in self._commands:
                self.display.note(f"There is no command /{name}; /help lists those there are.")
                return
            self._commands[name](rest.strip())
        except (QwenMLXError, ValueError, OSError) as error:
            self.chat.messages = before
            self.display.note(str(error))

    def say(self, text: str) -> None:
        self.stopped = False
        with self._stopping(), Progress("Prompt") as progress, closing(self.chat.send(text)) as events:

            def chunk_done(done: int, total: int) -> None:
                progress.update(done, total)
                if self.stopped:
                    raise _StoppedReading

            self.chat.options["progress"] = chunk_done
            try:
                self.display.answer(events, lambda: self.stopped)
            except _StoppedReading:
                self.display.note("Stopped before the answer began; /retry goes on from there.")
                return
        if self.chat.last:
            self.display.note(("Stopped. " if self.stopped else "") + closing_line(self.chat.last))
            if self._verbose and self.chat.last.reuse:
                self.display.note(self.chat.last.reuse)

    @contextmanager
    def _stopping(self) -> Iterator[None]:
        """Ctrl-C is answered between two tokens or two chunks of a prompt, where all can be kept; a second one breaks
        off at once."""

        def stop(number: int, frame: FrameType | None) -> None:
            if self.stopped:
                raise KeyboardInterrupt
            self.stopped = True

        before = signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def do_help(self, rest: str) -> None:
        self.display.note(HELP)

    def do_reset(self, rest: str) -> None:
        self.chat.messages = [m for m in self.chat.messages[:1] if m["role"] == "system"]

    def do_undo(self, rest: str) -> None:
        self.display.note(f"Taken back: {self.chat.rewind_turn()}")

    def do_retry(self, rest: str) -> None:
        self.say(self.chat.rewind_turn())

    def do_edit(self, rest: str) -> None:
        if not rest:
            raise ValueError("Write the new message behind /edit.")
        self.chat.rewind_turn()
        self.say(rest)

    def do_system(self, rest: str) -> None:
        others = [m for m in self.chat.messages if m["role"] != "system"]
        self.chat.messages = [*([{"role": "system", "content": rest}] if rest else []), *others]

    def do_thinking(self, rest: str) -> None:
        if rest not in THINKING:
            raise ValueError(f"/thinking takes {', '.join(THINKING)}, not {rest!r}.")
        self.chat.thinking = THINKING[rest]

    def do_thought(self, rest: str) -> None:
        self.display.note(self.display.thought or "There was no thought.")

    def do_tokens(self, rest: str) -> None:
        count = len(self.chat.tokenizer.encode(self.chat.prompt())) if self.spoken else 0
        kept = self.chat.options["prefix_store"].nbytes
        room = self.chat.model.config.text.context_length
        self.display.note(
            f"{count:,} of {room:,} tokens; {kept / 1e6:,.0f} MB are kept so as not to compute them again"
        )

    @property
    def spoken(self) -> bool:
        """Whether the user has said anything: templates refuse a prompt without."""
        return any(m["role"] == "user" for m in self.chat.messages)

    def do_save(self, rest: str) -> None:
        if not rest:
            raise ValueError("Write the name of a file behind /save.")
        path = Path(rest)
        unfinished = path.with_name(path.name + ".unfinished")
        messages = json.dumps({"messages": self.chat.messages}, ensure_ascii=False, indent=1)
        unfinished.write_text(messages + "\n", encoding="utf-8")
        unfinished.replace(path)

    def do_load(self, rest: str) -> None:
        try:
            messages = json.loads(Path(rest).read_text(encoding="utf-8"))["messages"]
            if not isinstance(messages, list) or not all(isinstance(m["role"], str) for m in messages):
                raise TypeError
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{rest} holds no conversation; take a file of /save.") from None
        self.chat.messages = messages


class _StoppedReading(KeyboardInterrupt):
    """Ctrl-C came while the prompt was read; the store has what was read up to then."""


def closing_line(last: GenerationResponse) -> str:
    return (
        f"{last.generation_tokens} tokens, {last.generation_tps:.1f} tok/s, "
        f"first after {last.time_to_first_token:.2f} s, "
        f"{last.cached_tokens} of {last.prompt_tokens} prompt tokens cached, {last.peak_memory:.2f} GB"
    )


def tools_of(path: Path) -> list[Callable[..., Any]]:
    """The functions that the Python file defines itself, but those whose names begin with _."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise PromptError(f"{path} is no Python file; --tools takes one whose functions become tools.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    functions = [f for name, f in inspect.getmembers(module, inspect.isfunction) if not name.startswith("_")]
    return [f for f in functions if f.__module__ == module.__name__]


def ask(call: ToolCall) -> bool:
    """y or n for one call of a tool; Ctrl-D is no."""
    arguments = json.dumps(call.arguments, ensure_ascii=False)
    try:
        return input(f"Run {call.name}({arguments})? [y/n] ").strip().lower() == "y"
    except EOFError:
        return False


def main(arguments: Sequence[str] | None = None) -> None:
    parser = _parser()
    args = parser.parse_args(arguments)
    given = sampling_of(parser, args)
    with mcp_tools(args.mcp) as tools:
        _converse(args, given, tools)


def _converse(args: argparse.Namespace, given: dict[str, Any], tools: Sequence[Tool]) -> None:
    interactive = sys.stdin is not None and sys.stdin.isatty()
    model, tokenizer = load(args.model, revision=args.revision, dtype=args.dtype)
    try:
        chat = Chat(
            model,
            tokenizer,
            system=args.system_prompt,
            tools=[*(tools_of(Path(args.tools)) if args.tools else []), *tools],
            approve=ask if interactive else lambda call: False,
            thinking=THINKING[args.thinking],
            thinking_budget=args.thinking_budget,
            loop_guard=not args.no_loop_guard,
            **{name: getattr(args, name) for name in MEMORY + DRAFTING},
            **given,
        )
    except ValueError as error:
        raise PromptError(str(error)) from None
    if args.prompt_cache_file and Path(args.prompt_cache_file).exists():
        chat.load(args.prompt_cache_file)
    repl = Repl(chat, Display(show_thinking=args.show_thinking), verbose=args.verbose)
    if not interactive:
        text = read_prompt(None)
        if not text.strip():
            raise PromptError("The prompt is empty; give at least one word.")
        repl.say(text)
        if args.prompt_cache_file:
            chat.save(args.prompt_cache_file)
        if repl.stopped:
            raise KeyboardInterrupt
        return
    repl.display.note(f"{args.model}. /help lists the commands.")
    while True:
        try:
            text = read_message()
            if text.strip():
                repl.handle(text)
        except EOFError:
            print()
            if args.prompt_cache_file and repl.spoken:
                chat.save(args.prompt_cache_file)
            return
        except KeyboardInterrupt:
            print()


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="qwen-mlx chat", description="Talk with a Qwen3.5 model.")
    add = parser.add_argument
    add_model(parser)
    add("--system-prompt", help="instructions that go before the conversation")
    add_thinking(parser)
    add("--thinking-budget", type=positive, help="tokens of thought after which its end is written for the model")
    add("--show-thinking", action="store_true", help="in a pipe, thought goes to stdout too, not to stderr")
    add("--no-loop-guard", action="store_true", help="let a thought that goes in circles go on")
    add("--tools", metavar="FILE", help="Python file whose typed functions the model may call, each after asking")
    add("--mcp", action="append", default=[], metavar="COMMAND", help="starts an MCP server, whose tools are added")
    add_sampling(parser)
    add_memory(parser)
    add_drafting(parser)
    add("--prompt-cache-file", help="go on from the conversation in this file, and keep it there when leaving")
    add("--verbose", action="store_true", help="say after each answer what of the prompt was known")
    return parser
