"""Answers in a terminal: when they are shown, in which form, and what becomes of them when its size changes."""

import json
import re
import select
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qwen_mlx import load
from tests.screen import Screen
from tests.terminal import Terminal

_, TOKENIZER = load("demo")
END = TOKENIZER.eos_token_id
WORDS = "One owl sat on a tall old tree and saw a small red fox run by the river with a fish".split()
PARAGRAPH = " ".join(WORDS * 4)
LINES = [f"line {number} of the code" for number in range(40)]


class Talk:
    """The chat in a terminal, its answer in parts, and what the terminal shows."""

    def __init__(self, folder: Path, *parts: str | list[int], columns: int = 80, rows: int = 24) -> None:
        tokens = [TOKENIZER.encode(part) if isinstance(part, str) else part for part in parts]
        tokens[-1] = [*tokens[-1], END]
        (folder / "script.json").write_text(json.dumps(tokens))
        self._folder = folder
        self.screen = Screen(columns, rows)
        self.terminal = Terminal([sys.executable, "-m", "tests.scripted_chat", str(folder)], columns=columns, rows=rows)
        self.terminal.until("> ")
        self.shown()

    def part(self, number: int) -> str:
        """Let the model say it; returns what is on the screen when it has waited for the next one."""
        (self._folder / f"{number}.go").touch()
        self._until((self._folder / f"{number + 1}.waiting").exists)
        return self.shown()

    def last_part(self, number: int) -> str:
        (self._folder / f"{number}.go").touch()
        self.terminal.until("tok/s.*> ")
        return self.shown()

    def resize(self, columns: int, rows: int) -> None:
        self.terminal.resize(columns, rows)
        self.screen.resize(columns, rows)

    def shown(self) -> str:
        self.screen.write(self.terminal.raw)
        self.terminal.raw = ""
        return self.screen.text

    def _until(self, happened: Callable[[], bool]) -> None:
        """What was written before is read then: a terminal takes it all before the writer goes on."""
        end = time.monotonic() + 90
        ready = True
        while ready or not happened():
            assert time.monotonic() < end, self.screen.text
            ready = bool(select.select([self.terminal.master], [], [], 0.1)[0])
            if ready:
                self.terminal.read()


@pytest.fixture
def talk(tmp_path: Path) -> Iterator[Callable[..., Talk]]:
    talks: list[Talk] = []

    def begin(*parts: str | list[int], **size: int) -> Talk:
        talks.append(Talk(tmp_path, *parts, **size))
        talks[-1].terminal.type("Go on.\n")
        return talks[-1]

    yield begin
    for each in talks:
        each.terminal.close()


def words(text: str) -> str:
    return " ".join(text.split())


def test_text_is_shown_before_the_answer_is_over(talk: Callable[..., Talk]) -> None:
    chat = talk("An owl sat on", " a tree.")
    assert "An owl sat" in chat.part(0)
    assert "An owl sat on a tree." in chat.last_part(1)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("An owl: 🦉!", id="emoji"),
        pytest.param("A flight: 👩\u200d🚀!", id="several_in_one"),
        pytest.param("Two: 🇫🇷🇯🇵!", id="flags"),
        pytest.param("ग\u0941र\u0941 नमस\u094dत\u0947!", id="marks_on_letters"),
        pytest.param("q\u0323\u0307y!", id="marks_that_have_no_letter_of_their_own"),
        pytest.param("漢字仮名交じり文!", id="wide"),
    ],
)
def test_characters_of_several_tokens_are_shown_whole(text: str, talk: Callable[..., Talk]) -> None:
    """After each token the screen has a beginning of the text, and nothing in the place of half a character."""
    ids = TOKENIZER.encode(text)
    assert any(len(TOKENIZER.encode(character)) > 1 for character in text)
    chat = talk(*([token] for token in ids))
    for number in range(len(ids) - 1):
        shown = chat.part(number).partition("Go on.\n")[2]
        assert text.startswith(shown)
    assert f"\n{text}\n" in chat.last_part(len(ids) - 1)


@pytest.mark.parametrize(("columns", "rows"), [(40, 24), (31, 30), (120, 24), (80, 12)])
def test_another_size_in_the_middle_of_an_answer(columns: int, rows: int, talk: Callable[..., Talk]) -> None:
    """Every word is there once, wherever the lines are broken."""
    chat = talk("First words.\n\n" + PARAGRAPH[:150], PARAGRAPH[150:])
    assert "First words." in chat.part(0)
    chat.resize(columns, rows)
    shown = chat.last_part(1)
    assert words(shown).count("First words.") == 1
    assert words(PARAGRAPH) in words(shown)
    assert words(shown).count("One owl") == 4


@pytest.mark.parametrize("rows", [10, 24])
def test_a_block_that_is_higher_than_the_terminal(rows: int, talk: Callable[..., Talk]) -> None:
    """What has scrolled out cannot be erased: each line of it must come there once."""
    chat = talk("```\n" + "\n".join(LINES) + "\n```\n\nThat was it.", rows=rows)
    shown = chat.last_part(0)
    assert re.findall(r"line \d+ of the code", shown) == LINES
    assert shown.count("That was it.") == 1
