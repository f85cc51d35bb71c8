"""What of an answer is shown where: in a pipe, and on a terminal that a StringIO stands for."""

import io
import re
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from qwen_mlx.chat.reply import Content, Thinking, UnfinishedCall
from qwen_mlx.chat.tools import ToolCall
from qwen_mlx.conversation import Cut, Event, ToolResult
from qwen_mlx.display import Display, _complete_blocks
from tests.screen import Screen

CALL = ToolCall("get_weather", {"city": "Paris"})
EVENTS = [
    Thinking("I wonder"),
    Thinking(" why."),
    CALL,
    ToolResult(CALL, "sunny\nwarm\ndry"),
    Content("It is"),
    Content(" fine."),
]


def never() -> bool:
    return False


@pytest.fixture
def terminal() -> Display:
    display = Display()
    display._out = Console(
        file=io.StringIO(), force_terminal=True, width=60, height=10, highlight=False, color_system=None
    )
    display._plain = False
    return display


def written_to(display: Display) -> str:
    assert isinstance(display._out.file, io.StringIO)
    return display._out.file.getvalue().replace("\n", "\r\n")


def shown(display: Display) -> str:
    """All that was written to the terminal, without the sequences that move the cursor and erase."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written_to(display)).replace("\r", "")


def on_screen(display: Display) -> Screen:
    screen = Screen(60, 10)
    screen.write(written_to(display))
    return screen


def test_a_pipe_gets_the_content_alone(capsys: pytest.CaptureFixture[str]) -> None:
    Display().answer(EVENTS, never)
    assert capsys.readouterr().out == "It is fine.\n"


def test_beside_a_pipe_stderr_gets_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    Display().answer(EVENTS, never)
    assert capsys.readouterr().err == (
        "I wonder why.\ncalls get_weather(city='Paris')\nget_weather gave sunny and 2 lines more\n"
    )


def test_a_pipe_gets_the_thought_where_it_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    Display(show_thinking=True).answer([Thinking("Hm."), Content("Yes.")], never)
    assert capsys.readouterr().out == "Hm.\nYes.\n"


def test_a_call_that_broke_off_is_shown_as_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    Display().answer([UnfinishedCall("<tool_call>\n<func")], never)
    assert capsys.readouterr().out == "<tool_call>\n<func\n"


@pytest.mark.parametrize(
    ("event", "words"),
    [
        (Cut("it went in circles"), "thinking was ended: it went in circles"),
        (ToolResult(CALL, ""), "get_weather gave "),
        (ToolResult(CALL, "sunny"), "get_weather gave sunny"),
        (ToolCall("now", {}), "calls now()"),
    ],
    ids=["cut", "nothing", "one_line", "no_arguments"],
)
def test_in_words(event: Any, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    Display().answer([event], never)
    assert capsys.readouterr().err == words + "\n"


def test_stopped_between_two_events(capsys: pytest.CaptureFixture[str]) -> None:
    answers = iter([False, True])
    Display().answer([Content("one "), Content("two "), Content("three")], lambda: next(answers))
    assert capsys.readouterr().out == "one two \n"


def test_the_thought_is_kept_until_the_next_answer(capsys: pytest.CaptureFixture[str]) -> None:
    display = Display()
    display.answer(EVENTS, never)
    assert display.thought == "I wonder why."
    display.answer([Content("Yes.")], never)
    assert display.thought == ""


def test_a_note_in_a_pipe_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    Display().note("three tokens")
    assert capsys.readouterr() == ("", "three tokens\n")


def test_a_terminal_shows_the_content_as_markdown(terminal: Display) -> None:
    terminal.answer([Content("Some **bold"), Content("** words.\n\nAnd more.")], never)
    assert "Some bold words." in shown(terminal)
    assert "And more." in shown(terminal)


def test_a_terminal_folds_the_thought(terminal: Display) -> None:
    terminal.answer([Thinking("Hm."), Content("Yes.")], never)
    assert re.search(r"thought for \d+\.\d s \(/thought shows it\)", shown(terminal))


def test_a_terminal_shows_the_last_lines_of_a_long_thought(terminal: Display) -> None:
    terminal.answer([Thinking("".join(f"line {i}\n" for i in range(20)))], never)
    assert "line 13" not in shown(terminal)
    assert "line 14" in shown(terminal)


def test_a_terminal_shows_what_was_there_before_an_error(terminal: Display) -> None:
    def broken() -> Any:
        yield Content("Half an answer")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        terminal.answer(broken(), never)
    assert shown(terminal).rstrip().endswith("Half an answer")


def test_paragraphs_are_a_line_apart_as_they_come(terminal: Display) -> None:
    terminal.answer([Content(text) for text in ("one\n", "\ntwo\n\n", "- three\n\n", "four")], never)
    assert on_screen(terminal).text == "one\n\ntwo\n\n • three\n\nfour"


def test_lines_are_not_filled_up_with_spaces(terminal: Display) -> None:
    """They would be empty lines where the terminal becomes narrower."""
    terminal.answer([Content("Some words."), CALL], never)
    assert [line for line in shown(terminal).split("\n") if line.endswith(" ")] == []


def test_the_end_of_a_high_block_is_seen_while_it_is_written(terminal: Display) -> None:
    """And the terminal, of 10 rows, is left with each line once."""
    lines = [f"line {number}" for number in range(30)]
    ends: list[str] = []

    def written() -> Iterator[Event]:
        yield Content("```\n")
        for line in lines:
            yield Content(f"{line}\n")
            ends.append(on_screen(terminal).text.split("\n")[-1].strip())
        yield Content("```")

    terminal.answer(written(), never)
    assert ends == lines
    assert re.findall(r"line \d+", on_screen(terminal).text) == lines


def test_what_was_drawn_is_found_again_in_a_narrower_terminal(terminal: Display) -> None:
    """Lines that were drawn for 60 columns stand in two rows of 40 then."""
    text = "word " * 30

    def written() -> Iterator[Event]:
        yield Content(text)
        screen = on_screen(terminal)
        screen.resize(40, 10)
        screens.append(screen)
        terminal._out.file.seek(0)
        terminal._out.file.truncate()
        terminal._out.width = 40
        yield Content("end.")

    screens: list[Screen] = []
    terminal.answer(written(), never)
    screens[0].write(written_to(terminal))
    assert " ".join(screens[0].text.split()) == f"{text}end."


def test_a_terminal_says_what_tools_do(terminal: Display) -> None:
    terminal.answer(EVENTS, never)
    assert "calls get_weather(city='Paris')" in shown(terminal)


def test_brackets_in_a_note_are_no_markup(terminal: Display) -> None:
    terminal.note("[bold]x[/bold]")
    assert shown(terminal) == "[bold]x[/bold]\n"


@pytest.mark.parametrize(
    ("text", "done"),
    [
        ("one\n\ntwo", "one\n\n"),
        ("one\ntwo", ""),
        ("one\n\ntwo\n\nthree", "one\n\ntwo\n\n"),
        ("a\n\n```\nx\n\ny\n", "a\n\n"),
        ("```\nx\n\ny\n```\n\nz", "```\nx\n\ny\n```\n\n"),
        ("~~~\nx\n```\n\ny\n~~~\n\nz", "~~~\nx\n```\n\ny\n~~~\n\n"),
        ("```python\nx\n```python\n\ny\n", ""),
        ("````\n```\n\ny\n```\n\n", ""),
        ("````\n```\n\n````\n\nz", "````\n```\n\n````\n\n"),
        ("```one``` word\n\ntwo", "```one``` word\n\n"),
        ("  ```\n  x\n\n  ```\n\nz", "  ```\n  x\n\n  ```\n\n"),
        ("one\n \ntwo", "one\n \n"),
        ("one\n  ", ""),
    ],
)
def test_complete_blocks(text: str, done: str) -> None:
    assert _complete_blocks(text) == (done, text.removeprefix(done))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(["```", "~~~", "````", "\n", "\n\n", "x", " ", "```py"]), max_size=30).map("".join))
def test_nothing_is_lost_between_the_blocks(text: str) -> None:
    done, rest = _complete_blocks(text)
    assert done + rest == text
    assert not done or done.endswith("\n")
