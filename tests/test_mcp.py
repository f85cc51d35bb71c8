"""Tools of MCP servers: a real one of the official package (mcp_server.py), called as the chat calls tools."""

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qwen_mlx import mcp_tools
from qwen_mlx.chat.tools import ToolCall
from qwen_mlx.conversation import Tool
from qwen_mlx.errors import PromptError
from tests.terminal import Terminal
from tests.test_conversation import CALL, chat, results, scripted

pytest.importorskip("mcp")

COMMAND = [sys.executable, "-m", "qwen_mlx.chat", "--model", "demo", "--temp", "0"]
SERVER = Path(__file__).with_name("mcp_server.py")
NO_TOOLS = "from mcp.server.mcpserver import MCPServer; MCPServer('none').run()"
PAGES = """
import anyio, mcp.types as types
from mcp.server.lowlevel import Server
from mcp.server.stdio import stdio_server

async def on_list_tools(context, params):
    page = int(params.cursor or 0) if params else 0
    tool = types.Tool(name=f"tool_{page}", input_schema={"type": "object"})
    return types.ListToolsResult(tools=[tool], next_cursor=str(page + 1) if page < 2 else None)

async def main():
    server = Server("pages", on_list_tools=on_list_tools)
    async with stdio_server() as streams:
        await server.run(*streams, server.create_initialization_options())

anyio.run(main)
"""


def python(program: str) -> str:
    return shlex.join([sys.executable, "-c", program])


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Where the server says how it is."""
    return tmp_path / "trace"


@pytest.fixture
def command(trace: Path) -> str:
    return shlex.join([sys.executable, str(SERVER), str(trace)])


@pytest.fixture
def tools(command: str) -> Iterator[dict[str, Tool]]:
    with mcp_tools.mcp_tools([command]) as tools:
        yield {tool.name: tool for tool in tools}


def test_a_tool_has_the_server_s_name_description_and_parameters(tools: dict[str, Tool]) -> None:
    function = tools["get_weather"].schema["function"]
    assert tools["get_weather"].schema["type"] == "function"
    assert (function["name"], function["description"]) == ("get_weather", "Get the weather in a city.")
    assert function["parameters"]["properties"]["city"]["type"] == "string"
    assert function["parameters"]["required"] == ["city"]


def test_a_tool_without_a_description_has_none(tools: dict[str, Tool]) -> None:
    assert "description" not in tools["count_to"].schema["function"]


@pytest.mark.parametrize(
    ("name", "key", "value", "told"),
    [
        pytest.param("get_weather", "city", "Paris", "sunny in Paris", id="text"),
        pytest.param("count_to", "number", "3", "1\n2\n3", id="several_texts"),
        pytest.param("draw", "thing", "cat", "a cat\n[image]", id="what_is_no_text"),
    ],
)
def test_what_the_model_is_told(
    monkeypatch: pytest.MonkeyPatch, tools: dict[str, Tool], name: str, key: str, value: str, told: str
) -> None:
    prompts = scripted(monkeypatch, CALL.format(name, key, value), "Fine.")
    assert results(list(chat(tools=[*tools.values()]).send("Go."))) == [told]
    assert f"<tool_response>\n{told}\n</tool_response>" in prompts[1]


@pytest.mark.parametrize(
    ("result", "text"),
    [
        pytest.param({"content": []}, "", id="nothing"),
        pytest.param({"content": [], "structuredContent": {"ä": None}}, '{"ä": null}', id="structure_alone"),
        pytest.param(
            {"content": [{"type": "text", "text": "two"}], "structuredContent": {"a": 2}}, "two", id="both_forms"
        ),
        pytest.param(
            {"content": [{"type": "resource", "resource": {"uri": "file:///a", "text": "all of it"}}]},
            "all of it",
            id="resource_of_text",
        ),
        pytest.param(
            {"content": [{"type": "resource", "resource": {"uri": "file:///a", "blob": "AA=="}}]},
            "[file:///a]",
            id="resource_of_bytes",
        ),
        pytest.param({"content": [{"type": "resource_link", "uri": "file:///a"}]}, "[file:///a]", id="link"),
        pytest.param(
            {"content": [{"type": "text", "text": "no wind"}], "isError": True}, "Error: no wind", id="an_error"
        ),
    ],
)
def test_results_in_text(result: dict[str, Any], text: str) -> None:
    assert mcp_tools._in_text(result) == text


def test_an_error_of_a_tool_is_told(monkeypatch: pytest.MonkeyPatch, tools: dict[str, Tool]) -> None:
    scripted(monkeypatch, CALL.format("get_weather", "town", "Paris"), "Fine.")
    (told,) = results(list(chat(tools=[*tools.values()]).send("Go.")))
    assert told.startswith("Error: ")
    assert "city" in told


def test_a_server_that_breaks_off_is_told(monkeypatch: pytest.MonkeyPatch, tools: dict[str, Tool]) -> None:
    scripted(monkeypatch, CALL.format("break_off", "reason", "x"), CALL.format("get_weather", "city", "Paris"), "Fine.")
    first, second = results(list(chat(tools=[*tools.values()]).send("Go.")))
    assert first.startswith("Error: ")
    assert second.startswith("Error: ")


def test_a_call_needs_approval(monkeypatch: pytest.MonkeyPatch, tools: dict[str, Tool]) -> None:
    asked: list[ToolCall] = []
    scripted(monkeypatch, CALL.format("get_weather", "city", "Paris"), "Fine.")
    talk = chat(tools=[*tools.values()], approve=lambda call: asked.append(call) or False)
    assert results(list(talk.send("Go."))) == ["Error: the user does not allow this call."]
    assert asked == [ToolCall("get_weather", {"city": "Paris"})]


def test_all_pages_of_a_long_list() -> None:
    with mcp_tools.mcp_tools([python(PAGES)]) as tools:
        assert [tool.name for tool in tools] == ["tool_0", "tool_1", "tool_2"]


def test_several_servers(command: str) -> None:
    with mcp_tools.mcp_tools([command, python(PAGES)]) as tools:
        assert {"get_weather", "tool_2"} <= {tool.name for tool in tools}


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_a_server_is_stopped_in_the_end(command: str, trace: Path, error: type[BaseException] | None) -> None:
    def talk() -> None:
        with mcp_tools.mcp_tools([command]):
            assert trace.read_text() == "running"
            if error:
                raise error("the end")

    if error:
        with pytest.raises(error, match="the end"):
            talk()
    else:
        talk()
    assert trace.read_text() == "stopped"


def test_a_server_is_stopped_when_the_next_one_does_not_start(command: str, trace: Path) -> None:
    with pytest.raises(PromptError), mcp_tools.mcp_tools([command, "no-such-command"]):
        pass
    assert trace.read_text() == "stopped"


def test_ctrl_c_breaks_off_the_waiting_for_a_tool(tools: dict[str, Tool], trace: Path) -> None:
    def interrupt() -> None:
        while trace.read_text() != "asleep":
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        tools["sleep"].run(seconds=600)
    assert tools["get_weather"].run(city="Paris") == "sunny in Paris"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        pytest.param("no-such-command x", "'no-such-command x' does not start: .*No such file.*", id="missing"),
        pytest.param("", "'' does not start: the command is empty", id="empty"),
        pytest.param("'a", '"\'a" does not start: No closing quotation', id="a_quotation_mark"),
        pytest.param(python("print('Hello')"), ".* does not start: Connection closed", id="ends_at_once"),
        pytest.param(
            python("import sys; print('The key is missing.', file=sys.stderr)"),
            ".* does not start: The key is missing",
            id="ends_with_a_reason",
        ),
        pytest.param(python(NO_TOOLS), ".* has no tools", id="no_tools"),
    ],
)
def test_a_server_that_is_of_no_use(command: str, said: str) -> None:
    with pytest.raises(PromptError, match=rf"\AThe MCP server {said}\.\Z"), mcp_tools.mcp_tools([command]):
        pass


def test_a_server_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mcp_tools, "SECONDS", 1)
    command = python("import sys; sys.stdin.read()")
    with pytest.raises(PromptError, match="told no tools within 1 seconds"), mcp_tools.mcp_tools([command]):
        pass


@pytest.mark.parametrize(
    ("count", "more", "said"),
    [
        pytest.param(1, ["--mcp", "no-such-command"], "The MCP server 'no-such-command' does not start: ", id="broken"),
        pytest.param(2, [], "Two tools have one name; those given are ", id="the_same_twice"),
    ],
)
def test_the_command_refuses_in_a_sentence(command: str, trace: Path, count: int, more: list[str], said: str) -> None:
    arguments = [*COMMAND, *["--mcp", command] * count, *more]
    done = subprocess.run(arguments, input="Hello", capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {said}")
    assert done.stderr.count("\n") == 1
    assert trace.read_text() == "stopped"


def test_ctrl_c_while_a_server_starts(trace: Path) -> None:
    program = f"""
import pathlib, sys
trace = pathlib.Path({str(trace)!r})
trace.write_text("running")
sys.stdin.read()
trace.write_text("stopped")
"""
    process = subprocess.Popen([*COMMAND, "--mcp", python(program)], stderr=subprocess.PIPE, stdin=subprocess.PIPE)
    while not trace.exists() or trace.read_text() != "running":
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, b"Interrupted.\n")
    assert trace.read_text() == "stopped"


def test_in_a_terminal(command: str, trace: Path, tmp_path: Path) -> None:
    """The model asks for the weather, the server tells it, and Ctrl-D stops both."""
    terminal = Terminal([*COMMAND, "--mcp", command, "--dtype", "float32"])
    try:
        terminal.until("> ")
        terminal.type("What is the weather in Paris?\n")
        terminal.until(r"Run get_weather.*\[y/n\] ")
        terminal.type("y\n")
        assert "get_weather gave sunny in Paris" in terminal.until("tok/s.*> ")
        terminal.type(f"/save {tmp_path / 'talk'}\n")
        terminal.until("> ")
        terminal.type("\x04")
        assert terminal.process.wait(timeout=60) == 0
    finally:
        terminal.close()
    messages = json.loads((tmp_path / "talk").read_text())["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "assistant"]
    assert messages[2]["content"] == "sunny in Paris"
    assert trace.read_text() == "stopped"
