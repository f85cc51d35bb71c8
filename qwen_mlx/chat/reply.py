"""Generated text to typed parts: what was thought, what was said, which tools are called.

In: a reply's text, in any split. Out: its parts, each as soon as no later text can change it. Knows no tokens and no
template: white space around thought and content is left out, because a template trims both and writes its own.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from qwen_mlx.chat.tools import NAME, ToolCall, Tools, parameters_of, read_call


@dataclass(frozen=True)
class Thinking:
    """More of what the model thinks."""

    text: str


@dataclass(frozen=True)
class Content:
    """More of what the model says."""

    text: str


@dataclass(frozen=True)
class UnfinishedCall:
    """The end of a reply that broke off in a tool call, as it was written; nothing in it is to be run."""

    text: str


Part = Thinking | Content | ToolCall | UnfinishedCall


def _half(*tags: str) -> str:
    """A pattern for what may still become one of these tags, nothing at all included."""
    return "|".join(sorted({re.escape(tag[:n]) for tag in tags for n in range(len(tag))}, reverse=True))


_THINK, _END_THINK, _CALL, _END_CALL = "<think>", "</think>", "<tool_call>", "</tool_call>"
_BODY = ("<parameter=", "</function>", _END_CALL)
_OPENING = re.compile(rf"(<tool_call>\s*)?<function=({NAME}{{1,128}})>\s*(?:{'|'.join(_BODY)})")
_HALF_BARE = re.compile(
    rf"{_half('<function=')}|<function={NAME}{{0,128}}|<function={NAME}{{1,128}}>\s*(?:{_half(*_BODY)})"
)
_HALF_WRAPPED = re.compile(rf"{_half(_CALL)}|<tool_call>\s*(?:{_HALF_BARE.pattern})")


def leaves_thinking_open(prompt: str) -> bool:
    """Whether the assistant's turn that ends `prompt` has begun to think and not ended it."""
    turn = prompt.rpartition("<|im_start|>")[2]
    return turn.startswith("assistant\n") and turn.rfind(_THINK) > turn.rfind(_END_THINK)


class ReplySplitter:
    """Splits one reply into parts. Pieces of thought, or of content, are to be joined as they come.

    Held back is only what cannot be told yet: half a tag, a call that is not complete, and white space, which counts
    if more text of its kind follows. Content is thus the reply without thought and calls, stripped at both ends.

    - After a prompt that left thinking open a reply thinks up to `</think>`; after another one if it begins with
      `<think>`. What the prompt holds of the turn beyond that tag is fed first.
    - `<tool_call>` and `<function=NAME>` open a call if a parameter or an end follows. Some models leave out the
      `<tool_call>`: then the tag must begin a line and, if the tools are known, name one of them.
    - In an open block of thought a call needs its `<tool_call>` and a tool's name. It ends the thought, for Qwen3.5
      forgets `</think>` before calls, unless `</think>` and more text follow: then it was thought of, not made.
    - A call that lacks a tag is repaired when the reply has ended. What cannot be is an UnfinishedCall.
    """

    def __init__(self, *, thinking: bool, tools: Tools | None = None):
        self._parameters = parameters_of(tools or ())
        self._thinking = thinking
        self._text = ""  # not decided yet
        # What to do with the text, told whether it has ended; returns whether there is more to do.
        self._state: Callable[[bool], bool] = self._at_start
        self._parts: list[Part] = []
        self._spaces = ""  # behind the text shown last
        self._begun = False  # whether any of this thought, or of the content, was shown
        self._at_line = True  # whether only white space stands before the text in its line
        self._searched = 0
        self._thought, self._thought_calls = "", list[ToolCall]()  # calls that may only be thought of

    def feed(self, text: str) -> list[Part]:
        """The parts that `text` completes."""
        self._text += text
        return self._run(final=False)

    def finish(self) -> list[Part]:
        """The parts still held back, when the reply has ended."""
        return self._run(final=True)

    def _run(self, *, final: bool) -> list[Part]:
        while self._state(final):
            pass
        parts, self._parts = self._parts, []
        return parts

    def _at_start(self, final: bool) -> bool:
        text = self._text.lstrip()
        if _THINK.startswith(text) and not final:
            return False
        if text.startswith(_THINK):
            self._thinking, self._text = True, text.removeprefix(_THINK)
        self._state = self._in_text
        return True

    def _in_text(self, final: bool) -> bool:
        at = self._text.find("<")
        while at >= 0 and (tag := self._tag_at(at, final)) == "none":
            at = self._text.find("<", at + 1)
        self._show(at if at >= 0 else len(self._text))
        if at < 0 or tag == "half":
            return False
        if tag == "end":
            self._text = self._text.removeprefix(_END_THINK)
            self._end_thinking()
        else:
            self._state, self._searched = self._in_call, 0
        return True

    def _tag_at(self, at: int, final: bool) -> Literal["none", "half", "end", "call"]:
        """What begins at `at` in the text; when it has ended, a call of which only half a tag is there is a call."""
        may_be_bare = not self._thinking and _begins_line(self._text, at, self._at_line)
        if self._thinking and self._text.startswith(_END_THINK, at):
            return "end"
        if opening := _OPENING.match(self._text, at):
            is_known = not self._parameters or opening[2] in self._parameters
            is_call = (is_known or not self._thinking) if opening[1] else (is_known and may_be_bare)
            return "call" if is_call else "none"
        is_half = _HALF_WRAPPED.fullmatch(self._text, at) or (may_be_bare and _HALF_BARE.fullmatch(self._text, at))
        if not is_half and not (self._thinking and _END_THINK.startswith(self._text[at : at + len(_END_THINK)])):
            return "none"
        if final:
            return "call" if self._text.startswith(_CALL, at) else "none"
        return "half"

    def _in_call(self, final: bool) -> bool:
        found = None
        if self._text.find("</function>", max(0, self._searched - len("</function>"))) >= 0:
            found = read_call(self._text, self._parameters)
        self._searched = len(self._text)
        end_thinking = self._text.find(_END_THINK) if self._thinking else -1
        if end_thinking >= 0 and (found is None or end_thinking < found[1]):
            self._show_thought()
            self._show(1)
            self._state = self._in_text
            return True
        if found is None and final:
            found = read_call(self._text, self._parameters, repair=True)
        if found is None:
            if final:
                self._make_thought_calls()
                self._parts.append(UnfinishedCall(self._text))
                self._text = ""
            return False
        call, end = found
        if self._thinking:
            self._thought_calls.append(call)
            self._thought += self._text[:end]
            self._state = self._after_thought_call
        else:
            self._parts.append(call)
            self._state = self._after_call
        self._text, self._at_line = self._text[end:], True
        return True

    def _after_call(self, final: bool) -> bool:
        text = self._text.lstrip()
        if _END_CALL.startswith(text) and not final:
            return False
        if text.startswith(_END_CALL):
            self._text = text.removeprefix(_END_CALL)
        self._state = self._in_text
        return True

    def _after_thought_call(self, final: bool) -> bool:
        text = self._text.lstrip()
        spaces = self._text[: len(self._text) - len(text)]
        tag = self._tag_at(len(spaces), final)
        if (tag == "half" or _END_CALL.startswith(text)) and not final:
            return False
        if text.startswith(_END_CALL):
            self._thought, self._text = self._thought + spaces + _END_CALL, text.removeprefix(_END_CALL)
        elif tag == "end":
            self._text, self._state = text.removeprefix(_END_THINK), self._after_closed_thought
        elif tag == "call":
            self._thought, self._text = self._thought + spaces, text
            self._state, self._searched = self._in_call, 0
        else:
            self._make_thought_calls()
            self._end_thinking()
        return True

    def _after_closed_thought(self, final: bool) -> bool:
        if self._text.strip():
            self._show_thought()
        elif final:
            self._make_thought_calls()
        else:
            return False
        self._end_thinking()
        return True

    def _show_thought(self) -> None:
        """The calls so far were only thought of."""
        self._text = self._thought + self._text
        self._show(len(self._thought))
        self._thought, self._thought_calls = "", []

    def _make_thought_calls(self) -> None:
        """The calls so far were meant."""
        self._parts += self._thought_calls
        self._thought, self._thought_calls = "", []

    def _show(self, count: int) -> None:
        """The first `count` characters are thought or content."""
        text, self._text = self._text[:count], self._text[count:]
        self._at_line = _begins_line(text, len(text), self._at_line)
        text = self._spaces + text
        shown = text.rstrip() if self._begun else text.strip()
        self._spaces = text[len(text.rstrip()) :]
        if shown:
            self._begun = True
            self._parts.append(Thinking(shown) if self._thinking else Content(shown))

    def _end_thinking(self) -> None:
        self._thinking, self._state = False, self._in_text
        self._begun, self._at_line = False, True


def _begins_line(text: str, at: int, at_line: bool) -> bool:
    """Whether only white space stands before `at` in its line; `at_line` says it of the text's own beginning."""
    newline = text.rfind("\n", 0, at)
    return (newline >= 0 or at_line) and not text[newline + 1 : at].strip()
