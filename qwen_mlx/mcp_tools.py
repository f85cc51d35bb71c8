"""Tools of MCP servers that run beside a conversation, over stdin and stdout (modelcontextprotocol.io).

In: the commands that start them. Out: a `Tool` for each of theirs, which is called as any other. Knows no model and no
terminal; the package mcp is imported where a server is asked for.
"""

import json
import logging
import os
import shlex
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any

from qwen_mlx.conversation import Tool
from qwen_mlx.errors import PromptError

if TYPE_CHECKING:
    from anyio.from_thread import BlockingPortal
    from mcp import ClientSession

SECONDS = 60
"""In which a server must have told its tools; some are downloaded when they are started."""


@contextmanager
def mcp_tools(commands: Sequence[str]) -> Iterator[list[Tool]]:
    """The tools of the servers that `commands` start, which are stopped at the end of the context.

    Raises PromptError where the package mcp is missing, and for a server that does not start or has no tools.
    """
    if not commands:
        yield []
        return
    try:
        import mcp  # noqa: F401
        from anyio.from_thread import start_blocking_portal
    except ImportError:
        raise PromptError(
            'MCP servers are reached through the package mcp, which is not here: pip install "qwen-mlx[mcp]"'
        ) from None
    logging.getLogger("mcp").addHandler(logging.NullHandler())  # what it logs would stand in the middle of an answer
    with ExitStack() as stack:
        portal = stack.enter_context(start_blocking_portal())
        yield [tool for command in commands for tool in _served(command, portal, stack)]


def _served(command: str, portal: "BlockingPortal", stack: ExitStack) -> list[Tool]:
    """The tools of a server that runs until `stack` is closed."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        try:
            server = portal.wrap_async_context_manager(_connected(shlex.split(command), said))
            client = server.__enter__()
            stack.callback(server.__exit__, None, None, None)  # in order, whatever ends the conversation
            tools = portal.call(_listed, client)
        except TimeoutError:
            raise PromptError(f"The MCP server {command!r} told no tools within {SECONDS} seconds.") from None
        except Exception as error:  # the system's, and the package's own, which changed their names
            said.seek(0)
            lines = [line for line in said.read().splitlines() if line.strip()] or [str(error)]
            raise PromptError(f"The MCP server {command!r} does not start: {lines[-1].strip(' .')}.") from None
    if not tools:
        raise PromptError(f"The MCP server {command!r} has no tools.")
    return [_tool(tool, client, portal) for tool in tools]


@asynccontextmanager
async def _connected(command: Sequence[str], said: Any) -> "AsyncIterator[ClientSession]":
    """A server that runs, in our environment as any command would; its stderr goes to the file `said`."""
    from mcp import ClientSession, StdioServerParameters, stdio_client

    if not command:
        raise ValueError("the command is empty")
    parameters = StdioServerParameters(command=command[0], args=[*command[1:]], env=dict(os.environ))
    async with stdio_client(parameters, said) as streams, ClientSession(*streams) as client:
        yield client


async def _listed(client: "ClientSession") -> list[dict[str, Any]]:
    """All tools, page by page, in the protocol's own names."""
    from anyio import fail_after
    from mcp.types import PaginatedRequestParams

    tools: list[dict[str, Any]] = []
    with fail_after(SECONDS):
        await client.initialize()
        page: dict[str, Any] = {"nextCursor": None}
        while "nextCursor" in page:
            params = PaginatedRequestParams(cursor=page["nextCursor"])
            page = (await client.list_tools(params=params)).model_dump(by_alias=True, exclude_none=True)
            tools += page["tools"]
    return tools


def _tool(tool: Mapping[str, Any], client: "ClientSession", portal: "BlockingPortal") -> Tool:
    def run(**arguments: Any) -> str:
        answer = portal.start_task_soon(client.call_tool, tool["name"], arguments)
        try:
            return _in_text(answer.result().model_dump(by_alias=True, exclude_none=True))
        finally:
            answer.cancel()  # where Ctrl-C broke off the waiting

    named = {name: tool[name] for name in ("name", "description") if tool.get(name)}
    return Tool({"type": "function", "function": {**named, "parameters": tool["inputSchema"]}}, run)


def _in_text(result: Mapping[str, Any]) -> str:
    """What a tool gave back, as the model reads it: of what is no text, where it is or of which kind."""
    blocks = [block.get("resource", block) for block in result["content"]]
    texts = [block["text"] if "text" in block else f"[{block.get('uri') or block['type']}]" for block in blocks]
    if not texts and "structuredContent" in result:
        texts = [json.dumps(result["structuredContent"], ensure_ascii=False)]
    return ("Error: " if result.get("isError") else "") + "\n".join(texts)
