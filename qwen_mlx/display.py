"""An answer on a terminal, part by part: thought dim and folded when it is over, content as Markdown.

Where stdout is no terminal, content goes there as it stands, and everything else to stderr.
"""

import re
import sys
import time
from collections.abc import Callable, Iterable

from rich.console import Console
from rich.live import Live
from rich.markdown import Markdown
from rich.text import Text

from qwen_mlx.chat.reply import Content, Thinking, UnfinishedCall
from qwen_mlx.chat.tools import ToolCall
from qwen_mlx.conversation import Cut, Event, ToolResult

THOUGHT_LINES = 6
"""Of a thought while it goes on, the last so many lines are shown."""
FENCE = re.compile(r"\s*(`{3,}(?=[^`]*$)|~{3,})(.*)", re.DOTALL)
"""A line that begins or ends a block of code: the marks, and what stands behind them."""


class Display:
    """Shows the events of one answer after another; `thought` is the last one in full."""

    def __init__(self, *, show_thinking: bool = False) -> None:
        self.thought = ""
        self._show_thinking = show_thinking
        self._out = Console(highlight=False)
        self._plain = not self._out.is_terminal

    def answer(self, events: Iterable[Event], stopped: Callable[[], bool]) -> None:
        """Show `events` until they end, or `stopped` says so between two of them."""
        self.thought = ""
        part = _Plain(self._show_thinking) if self._plain else _Rich(self._out)
        try:
            for event in events:
                if isinstance(event, Thinking):
                    self.thought += event.text
                part.add(event)
                if stopped():
                    break
        finally:
            part.close()

    def note(self, text: str) -> None:
        """A line that is no part of an answer."""
        if self._plain:
            print(text, file=sys.stderr, flush=True)
        else:
            self._out.print(Text(text, style="dim"))


class _Plain:
    def __init__(self, show_thinking: bool) -> None:
        self._thought = sys.stdout if show_thinking else sys.stderr
        self._last: type | None = None

    def add(self, event: Event) -> None:
        if self._last is Thinking and not isinstance(event, Thinking):
            print(file=self._thought, flush=True)
        if isinstance(event, Thinking):
            print(event.text, end="", file=self._thought, flush=True)
        elif isinstance(event, (Content, UnfinishedCall)):
            print(event.text, end="", flush=True)
        else:
            print(_in_words(event), file=sys.stderr, flush=True)
        self._last = type(event)

    def close(self) -> None:
        print(flush=True)


class _Rich:
    """What is still being written is drawn anew with every piece; what is complete is printed once."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None
        self._thought, self._began = "", 0.0
        self._block = ""

    def add(self, event: Event) -> None:
        if isinstance(event, Thinking):
            if not self._thought:
                self._began = time.monotonic()
            self._thought += event.text
            lines = self._thought.splitlines()[-THOUGHT_LINES:]
            self._draw(Text("\n".join(lines), style="dim italic"))
            return
        self._fold()
        if isinstance(event, (Content, UnfinishedCall)):
            self._block += event.text
            done, self._block = _complete_blocks(self._block)
            if done:
                self._end()
                self._console.print(Markdown(done))
            if self._block.strip():
                self._draw(Markdown(self._block))
        else:
            self._flush()
            self._console.print(Text(_in_words(event), style="dim"))

    def close(self) -> None:
        self._fold()
        self._flush()

    def _draw(self, what: Text | Markdown) -> None:
        if self._live is None:
            self._live = Live(console=self._console, transient=True, auto_refresh=False, vertical_overflow="visible")
            self._live.start()
        self._live.update(what, refresh=True)

    def _end(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _flush(self) -> None:
        self._end()
        if self._block.strip():
            self._console.print(Markdown(self._block))
        self._block = ""

    def _fold(self) -> None:
        if self._thought:
            self._end()
            seconds = time.monotonic() - self._began
            self._console.print(Text(f"thought for {seconds:.1f} s (/thought shows it)", style="dim"))
            self._thought = ""


def _complete_blocks(text: str) -> tuple[str, str]:
    """Markdown up to the last blank line outside a fence, and the rest."""
    done, fence = 0, ""
    place = 0
    for line in text.splitlines(keepends=True):
        place += len(line)
        found = FENCE.match(line)
        if fence:
            # It ends at marks of its own kind, as many or more, with nothing behind them (CommonMark 0.31, 4.5).
            ends = found and found[1].startswith(fence) and not found[2].strip()
            fence = "" if ends else fence
        elif found:
            fence = found[1]
        elif not line.strip() and line.endswith("\n"):
            done = place
    return text[:done], text[done:]


def _in_words(event: Event) -> str:
    if isinstance(event, ToolCall):
        given = ", ".join(f"{name}={value!r}" for name, value in event.arguments.items())
        return f"calls {event.name}({given})"
    if isinstance(event, ToolResult):
        first, *more = event.text.splitlines() or [""]
        return f"{event.call.name} gave {first}{f' and {len(more)} lines more' if more else ''}"
    assert isinstance(event, Cut)
    return f"thinking was ended: {event.reason}"
