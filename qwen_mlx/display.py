"""An answer on a terminal, part by part: thought dim and folded when it is over, content as Markdown.

Where stdout is no terminal, content goes there as it stands, and everything else to stderr.
"""

import re
import sys
import time
from collections.abc import Callable, Iterable

from rich.console import Console, RenderableType
from rich.markdown import Markdown
from rich.segment import Segment, Segments
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
        self._drawn: list[int] = []  # cells of each line of what is still being written
        self._thought, self._began = "", 0.0
        self._block = ""

    def add(self, event: Event) -> None:
        if isinstance(event, Thinking):
            if not self._thought:
                self._began = time.monotonic()
            self._thought += event.text
            lines = self._thought.splitlines()[-THOUGHT_LINES:]
            self._show(Text("\n".join(lines), style="dim italic"), stays=False)
            return
        self._fold()
        if isinstance(event, (Content, UnfinishedCall)):
            self._block += event.text
            done, self._block = _complete_blocks(self._block)
            if done.strip():
                self._show(Markdown(done))
                self._console.print()
            if self._block.strip():
                self._show(Markdown(self._block), stays=False)
        else:
            self._flush()
            self._show(Text(_in_words(event), style="dim"))

    def close(self) -> None:
        self._fold()
        self._flush()

    def _show(self, what: RenderableType, *, stays: bool = True) -> None:
        """In place of what was drawn last. Terminals wrap lines that have become too long for them, and of what has
        left them at the top nothing can be erased: what does not stay is never higher than they are."""
        width, height = self._console.size
        lines = [_without_end(line) for line in self._console.render_lines(what, pad=False)]
        for end in (0, -1):  # some kinds of blocks begin and end with an empty line, others do not
            while lines and not lines[end]:
                del lines[end]
        if not stays:
            lines = lines[1 - height :]
        up = sum(max(1, -(-cells // width)) for cells in self._drawn) - 1
        segments = [Segment(f"\r\x1b[{up}A\x1b[J" if up > 0 else "\r\x1b[J", control=[])] if self._drawn else []
        for number, line in enumerate(lines, start=1):
            segments += [*line, Segment.line()] if stays or number < len(lines) else line
        self._console.print(Segments(segments), end="", crop=False)
        self._drawn = [] if stays else [Segment.get_line_length(line) for line in lines]

    def _flush(self) -> None:
        if self._block.strip():
            self._show(Markdown(self._block))
        self._block = ""

    def _fold(self) -> None:
        if self._thought:
            seconds = time.monotonic() - self._began
            self._show(Text(f"thought for {seconds:.1f} s (/thought shows it)", style="dim"))
            self._thought = ""


def _without_end(line: list[Segment]) -> list[Segment]:
    """Without the spaces that fill a line up, and would be lines of their own in a terminal that becomes narrower."""
    line = list(line)
    while line and not (line[-1].style and line[-1].style.bgcolor):
        last = line.pop()
        if text := last.text.rstrip(" "):
            return [*line, Segment(text, last.style)]
    return line


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
