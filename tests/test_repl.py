"""`python -m qwen_mlx.chat`: its commands, a pipe, and a terminal of its own."""

import json
import os
import re
import readline
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qwen_mlx import conversation, load
from qwen_mlx.chat.tools import ToolCall
from qwen_mlx.cli import Progress
from qwen_mlx.conversation import Chat
from qwen_mlx.display import Display
from qwen_mlx.errors import PromptError
from qwen_mlx.generate import GenerationResponse
from qwen_mlx.repl import Repl, ask, closing_line, main, tools_of
from tests.terminal import Terminal

MODEL, TOKENIZER = load("demo")
COMMAND = [sys.executable, "-m", "qwen_mlx.chat", "--model", "demo", "--temp", "0"]
SAID = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi ä", "reasoning_content": ""},
    {"role": "user", "content": "Who are you?"},
    {"role": "assistant", "content": "I am.", "reasoning_content": ""},
]
SYSTEM = {"role": "system", "content": "Be brief."}
SLOW_TOOL = '''
import time

def get_weather(city: str) -> str:
    """Get the weather in a city.

    Args:
        city: The city.
    """
    print("asleep", flush=True)
    for _ in range(3000):
        time.sleep(0.1)
    return ""
'''


@pytest.fixture
def repl() -> Repl:
    chat = Chat(MODEL, TOKENIZER, system="Be brief.", temperature=0, max_tokens=6)
    chat.messages += [dict(message) for message in SAID]
    return Repl(chat, Display())


def roles(repl: Repl) -> str:
    return " ".join(message["role"] for message in repl.chat.messages)


def noted(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err


def test_help_lists_every_command(repl: Repl, capsys: pytest.CaptureFixture[str]) -> None:
    repl.handle("/help")
    assert {*re.findall(r"^/(\w+)", noted(capsys), re.MULTILINE)} == {*repl._commands}


def test_reset(repl: Repl) -> None:
    repl.handle("/reset")
    assert repl.chat.messages == [SYSTEM]


def test_reset_without_a_system_message(repl: Repl) -> None:
    del repl.chat.messages[0]
    repl.handle("/reset")
    assert repl.chat.messages == []


def test_undo(repl: Repl, capsys: pytest.CaptureFixture[str]) -> None:
    repl.handle("/undo")
    assert repl.chat.messages == [SYSTEM, *SAID[:2]]
    assert noted(capsys) == "Taken back: Who are you?\n"


def test_retry_answers_the_last_message_again(repl: Repl) -> None:
    repl.handle("/retry")
    assert repl.chat.messages[:4] == [SYSTEM, *SAID[:3]]
    assert roles(repl).endswith("user assistant")
    assert repl.chat.messages[-1]["content"] != "I am."


def test_edit_says_something_else(repl: Repl) -> None:
    repl.handle("/edit What is the capital of France?")
    assert repl.chat.messages[:3] == [SYSTEM, *SAID[:2]]
    assert repl.chat.messages[3] == {"role": "user", "content": "What is the capital of France?"}
    assert roles(repl).endswith("user assistant")


def test_system(repl: Repl) -> None:
    repl.handle("/system Be long.")
    assert repl.chat.messages == [{"role": "system", "content": "Be long."}, *SAID]


def test_no_system(repl: Repl) -> None:
    repl.handle("/system")
    assert repl.chat.messages == SAID


@pytest.mark.parametrize(("word", "thinking"), [("on", True), ("off", False), ("auto", None)])
def test_thinking(repl: Repl, word: str, thinking: bool | None) -> None:
    repl.chat.thinking = "before"  # type: ignore[assignment]
    repl.handle(f"/thinking {word}")
    assert repl.chat.thinking is thinking


def test_thought(repl: Repl, capsys: pytest.CaptureFixture[str]) -> None:
    repl.display.thought = "Hm."
    repl.handle("/thought")
    assert noted(capsys) == "Hm.\n"


def test_no_thought(repl: Repl, capsys: pytest.CaptureFixture[str]) -> None:
    repl.handle("/thought")
    assert noted(capsys) == "There was no thought.\n"


def test_tokens(repl: Repl, capsys: pytest.CaptureFixture[str]) -> None:
    repl.handle("/tokens")
    count = len(TOKENIZER.encode(repl.chat.prompt()))
    assert noted(capsys).startswith(f"{count} of {MODEL.config.text.context_length:,} tokens; 0 MB are kept")


@pytest.mark.parametrize("messages", [[], [SYSTEM]], ids=["nothing", "a_system_message"])
def test_tokens_before_anything_was_said(repl: Repl, messages: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    repl.chat.messages = messages
    repl.handle("/tokens")
    assert noted(capsys).startswith("0 of ")


def test_save_and_load(repl: Repl, tmp_path: Path) -> None:
    repl.handle(f"/save {tmp_path / 'a talk.json'}")
    repl.handle("/reset")
    repl.handle(f"/load {tmp_path / 'a talk.json'}")
    assert repl.chat.messages == [SYSTEM, *SAID]
    assert os.listdir(tmp_path) == ["a talk.json"]


def test_what_is_saved_is_json(repl: Repl, tmp_path: Path) -> None:
    repl.handle(f"/save {tmp_path / 'talk.json'}")
    assert json.loads((tmp_path / "talk.json").read_bytes()) == {"messages": [SYSTEM, *SAID]}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("/nothing at all", "There is no command /nothing; /help lists those there are."),
        ("/", "There is no command /; /help lists those there are."),
        ("/edit", "Write the new message behind /edit."),
        ("/save", "Write the name of a file behind /save."),
        ("/thinking often", "/thinking takes auto, on, off, not 'often'."),
        ("/load no/such/file", "No such file or directory"),
        ("/save no/such/file", "No such file or directory"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_changes(
    repl: Repl, text: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    repl.handle(text)
    assert said in noted(capsys)
    assert repl.chat.messages == [SYSTEM, *SAID]
    assert repl.chat.thinking is None


@pytest.mark.parametrize(
    "content",
    [b"hello", b"\xff", b"[]", b"{}", b'{"messages": {}}', b'{"messages": "ab"}', b'{"messages": [{"role": 1}]}'],
)
def test_a_file_that_is_no_conversation(
    repl: Repl, tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "talk").write_bytes(content)
    repl.handle(f"/load {tmp_path / 'talk'}")
    assert noted(capsys) == f"{tmp_path / 'talk'} holds no conversation; take a file of /save.\n"
    assert repl.chat.messages == [SYSTEM, *SAID]


@pytest.mark.parametrize("text", ["Hello", "/retry", "/edit Hello"])
def test_an_answer_that_fails_leaves_all_as_it_was(repl: Repl, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    repl.chat.options["max_tokens"] = -1
    repl.handle(text)
    assert "max_tokens" in noted(capsys)
    assert repl.chat.messages == [SYSTEM, *SAID]


@pytest.mark.parametrize("text", ["/undo", "/retry", "/edit Hello"])
def test_there_is_nothing_to_take_back(repl: Repl, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    repl.chat.messages = [SYSTEM]
    repl.handle(text)
    assert "nothing has been said yet" in noted(capsys)
    assert repl.chat.messages == [SYSTEM]


def test_ctrl_c_is_python_s_own_again_after_an_answer(repl: Repl) -> None:
    before = signal.getsignal(signal.SIGINT)
    repl.handle("Hello")
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_while_the_prompt_is_read(
    repl: Repl, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No chunk is read after the one in which it came, and those before need not be read again."""
    told: list[tuple[int, int]] = []

    def interrupted(progress: Progress, done: int, total: int) -> None:
        told.append((done, total))
        if len(told) == 4:
            os.kill(os.getpid(), signal.SIGINT)

    repl.chat.options["prefill_step_size"] = 16
    monkeypatch.setattr(Progress, "update", interrupted)
    repl.handle("Tell me a story about an owl.")
    total = told[0][1]
    assert told == [(0, total), (16, total), (32, total), (48, total)]
    assert total > 64
    assert repl.chat.messages[5:6] == [{"role": "user", "content": "Tell me a story about an owl."}]
    assert noted(capsys) == "Stopped before the answer began; /retry goes on from there.\n"
    repl.handle("/retry")
    assert repl.chat.last is not None
    assert 16 < repl.chat.last.cached_tokens <= 48
    assert repl.chat.messages[6]["content"]


def known(repl: Repl) -> tuple[int, int]:
    """Of the last prompt the tokens that were not computed, and all."""
    assert repl.chat.last is not None
    return repl.chat.last.cached_tokens, repl.chat.last.prompt_tokens


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("again", [["/retry"], ["/undo", "Tell me a story."]], ids=["retry", "undo"])
def test_the_same_message_again_computes_one_token(repl: Repl, thinking: bool, again: list[str]) -> None:
    """The last one, whose logits are wanted."""
    repl.chat.thinking = thinking
    repl.handle("What is 3 + 4?")
    repl.handle("Tell me a story.")
    _, count = known(repl)
    for _ in range(2):
        for line in again:
            repl.handle(line)
        assert known(repl) == (count - 1, count)


@pytest.mark.parametrize("thinking", [True, False])
def test_another_message_in_its_place_computes_that_message(repl: Repl, thinking: bool) -> None:
    repl.chat.thinking = thinking
    repl.handle("What is 3 + 4?")
    repl.handle("Tell me a story.")
    before, _, _ = repl.chat.prompt().partition("<|im_start|>user\nTell me a story.")
    repl.handle("/edit Who are you?")
    assert known(repl)[0] == len(TOKENIZER.encode(before))


def test_a_message_with_tools_again_computes_one_token(monkeypatch: pytest.MonkeyPatch) -> None:
    def get_weather(city: str) -> str:
        """Get the weather in a city."""
        return "sunny"

    repl = Repl(Chat(MODEL, TOKENIZER, tools=[get_weather], temperature=0, max_tokens=60), Display())
    firsts: list[GenerationResponse] = []
    written = conversation.stream_generate

    def heard(*arguments: Any, **options: Any) -> Iterator[GenerationResponse]:
        for number, response in enumerate(written(*arguments, **options)):
            firsts.extend([response] if number == 0 else [])
            yield response

    monkeypatch.setattr(conversation, "stream_generate", heard)
    repl.handle("What is the weather in Paris?")
    repl.handle("/retry")
    assert roles(repl) == "user assistant tool assistant"
    assert [first.prompt_tokens - first.cached_tokens for first in firsts[2:]] == [1, 1]


def test_closing_line() -> None:
    last: Any = SimpleNamespace(
        generation_tokens=12,
        generation_tps=34.56,
        time_to_first_token=0.123,
        cached_tokens=5,
        prompt_tokens=9,
        peak_memory=1.5,
    )
    assert closing_line(last) == ("12 tokens, 34.6 tok/s, first after 0.12 s, 5 of 9 prompt tokens cached, 1.50 GB")


def test_an_answer_ends_with_the_closing_line(repl: Repl, capsys: pytest.CaptureFixture[str]) -> None:
    repl.handle("Hello")
    assert repl.chat.last is not None
    assert noted(capsys).endswith(closing_line(repl.chat.last) + "\n")


def test_tools_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "tools.py").write_text(
        "from os.path import join\nclass Thing: pass\ndef add(a, b): return a + b\ndef _hidden(): pass\n"
    )
    assert [tool.__name__ for tool in tools_of(tmp_path / "tools.py")] == ["add"]


@pytest.mark.parametrize("name", ["missing.py", "talk.txt"])
def test_no_file_of_tools(tmp_path: Path, name: str) -> None:
    (tmp_path / "talk.txt").touch()
    with pytest.raises(PromptError, match="is no Python file; --tools takes one"):
        tools_of(tmp_path / name)


@pytest.mark.parametrize(("typed", "runs"), [("y", True), (" Y ", True), ("n", False), ("", False), ("yes!", False)])
def test_a_tool_is_run_after_y(monkeypatch: pytest.MonkeyPatch, typed: str, runs: bool) -> None:
    monkeypatch.setattr("builtins.input", lambda question: typed)
    assert ask(ToolCall("add", {"a": 1})) is runs


def test_the_question_names_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or "n")
    ask(ToolCall("add", {"a": "ä"}))
    assert asked == ['Run add({"a": "ä"})? [y/n] ']


def test_the_end_of_input_is_no_yes(monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(question: str) -> str:
        raise EOFError

    monkeypatch.setattr("builtins.input", ended)
    assert not ask(ToolCall("add", {}))


def test_the_package_of_mcp_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mcp", None)
    with pytest.raises(PromptError, match=r'which is not here: pip install "qwen-mlx\[mcp\]"'):
        main(["--model", "demo", "--mcp", "a-server"])


def test_a_parameter_out_of_range(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--model", "demo", "--top-p", "7"])
    assert noted(capsys).startswith("error: ")


def piped(text: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], input=text, capture_output=True, text=True, timeout=120)


def test_a_pipe_gets_the_answer_alone() -> None:
    """The golden answer, by transformers: tests/golden/demo.json."""
    done = piped("What is 3 + 4?\n", "--thinking", "on", "--dtype", "float32")
    assert (done.returncode, done.stdout) == (0, "3 + 4 = 7\n")
    assert "I add 3 and 4. The sum is 7." in done.stderr


def test_an_empty_pipe() -> None:
    done = piped(" \n")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: The prompt is empty; give at least one word.\n"


def test_ctrl_c_ends_a_pipe_with_130() -> None:
    process = subprocess.Popen(
        [*COMMAND, "--max-tokens", "2000"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"Tell me a story about an owl.")
    process.stdin.close()
    process.stdin = None
    process.stdout.read(5)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Stopped." in said


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    terminal = Terminal([*COMMAND, "--max-tokens", "2000", "--dtype", "float32"])
    terminal.until("> ")
    yield terminal
    terminal.close()


def left(terminal: Terminal) -> int:
    terminal.type("\x04")
    return terminal.process.wait(timeout=60)


def test_an_answer_in_a_terminal(terminal: Terminal) -> None:
    terminal.type("/thinking on\n")
    terminal.until("> ")
    terminal.type("What is 3 + 4?\n")
    shown = terminal.until(r"tok/s.*GB.*> ")
    assert "3 + 4 = 7" in shown
    assert "thought for" in shown
    assert left(terminal) == 0


def test_ctrl_c_keeps_the_conversation(terminal: Terminal, tmp_path: Path) -> None:
    terminal.type("Tell me a story about an owl.\n")
    terminal.until("owl.*owl")
    terminal.type("\x03")
    terminal.until(r"Stopped\. \d+ tokens.*> ")
    terminal.type(f"/save {tmp_path / 'talk'}\n")
    terminal.until("> ")
    messages = json.loads((tmp_path / "talk").read_text())["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"]
    assert messages[1]["content"]


def test_one_ctrl_c_stops_the_reading_of_a_long_prompt(terminal: Terminal) -> None:
    terminal.type("One owl sat on a tree.\n" * 2000)
    terminal.until(r"Prompt: \d+ of \d+ tokens")
    terminal.type("\x03")
    shown = terminal.until("Stopped before the answer began; .*> ")
    assert "tok/s" not in shown
    assert left(terminal) == 0


def test_ctrl_c_at_the_prompt_brings_a_new_one(terminal: Terminal) -> None:
    terminal.type("half a line")
    terminal.until("half a line")
    terminal.interrupt_until("> ")
    assert left(terminal) == 0


def test_a_second_ctrl_c_breaks_off_and_leaves_the_conversation(tmp_path: Path) -> None:
    """The first one is answered between two tokens, and a tool that hangs yields none."""
    (tmp_path / "tools.py").write_text(SLOW_TOOL)
    terminal = Terminal([*COMMAND, "--tools", str(tmp_path / "tools.py")])
    try:
        terminal.until("> ")
        terminal.type("What is the weather in Paris?\n")
        terminal.until(r"Run get_weather.*\[y/n\] ")
        terminal.type("y\n")
        terminal.until("asleep")
        terminal.type("\x03")
        time.sleep(0.5)  # two at once are one to the process
        terminal.type("\x03")
        terminal.until("> ")
        terminal.type(f"/save {tmp_path / 'talk'}\n")
        terminal.until("> ")
    finally:
        terminal.close()
    messages = json.loads((tmp_path / "talk").read_text())["messages"]
    assert messages[0]["content"] == "What is the weather in Paris?"


def test_a_line_that_goes_on_in_the_next(terminal: Terminal, tmp_path: Path) -> None:
    terminal.type("one \\\n")
    terminal.until("… ")
    terminal.type("two\n")
    terminal.until("tok/s.*> ")
    terminal.type(f"/save {tmp_path / 'talk'}\n")
    terminal.until("> ")
    assert json.loads((tmp_path / "talk").read_text())["messages"][0]["content"] == "one \ntwo"


LINES = [f"line {i} of a long text" for i in range(10_000)]


@pytest.mark.parametrize(
    ("typed", "then", "message"),
    [
        pytest.param("\r".join(LINES) + "\r", "", "\n".join(LINES), id="at_once"),
        pytest.param("\r".join(LINES), " is edited\r", "\n".join(LINES) + " is edited", id="without_a_last_end"),
        pytest.param(
            "\x1b[200~" + "\r".join(LINES) + "\x1b[201~",
            "\r",
            "\n".join(LINES),
            id="in_brackets",
            marks=pytest.mark.skipif("libedit" in str(readline.__doc__), reason="libedit does not know the brackets"),
        ),
        pytest.param("\r".join(["ä" * 9000] * 3) + "\r", "", "\n".join(["ä" * 9000] * 3), id="long_lines"),
        pytest.param("one \\\rtwo \\\r\rthree\r", "", "one \\\ntwo \\\n\nthree", id="backslashes"),
    ],
)
def test_a_paste_is_one_message(tmp_path: Path, typed: str, then: str, message: str) -> None:
    read = f"import pathlib, readline, qwen_mlx.repl as r; pathlib.Path({str(tmp_path / 'message')!r}).write_text"
    terminal = Terminal([sys.executable, "-c", f"{read}(r.read_message(), 'utf-8'); print('and', 'done')"])
    try:
        terminal.until("> ")
        terminal.type(typed)
        if then:
            terminal.until(LINES[-1])
            terminal.type(then)
        terminal.until("and done")
    finally:
        terminal.close()
    assert (tmp_path / "message").read_text("utf-8") == message


def test_the_terminal_is_afterwards_as_it_was(terminal: Terminal) -> None:
    """It puts lines together and shows what is typed, while an answer is written."""
    terminal.type("Tell me a story about an owl.\n")
    terminal.until("owl.*owl")
    modes = termios.tcgetattr(terminal.master)[3]
    assert modes & termios.ICANON
    assert modes & termios.ECHO
