"""A server of tools for test_mcp.py, which starts it: `python tests/mcp_server.py FILE`.

FILE has its process id while it runs; at the end `stopped` is written there.
"""

import os
import sys
from pathlib import Path

import anyio
from mcp.server.mcpserver import Image, MCPServer

server = MCPServer("weather")
trace = Path(sys.argv[1])


@server.tool()
def get_weather(city: str) -> str:
    """Get the weather in a city."""
    return f"sunny in {city}"


@server.tool()
def count_to(number: int) -> list[int]:
    return list(range(1, number + 1))


@server.tool()
def draw(thing: str) -> list[str | Image]:
    return [f"a {thing}", Image(data=b"\x89PNG", format="png")]


@server.tool()
def break_off(reason: str) -> str:
    os._exit(1)


@server.tool()
async def sleep(seconds: float) -> str:
    trace.write_text("asleep")
    await anyio.sleep(seconds)
    return "slept"


if __name__ == "__main__":
    print("one more server", file=sys.stderr)
    trace.write_text("running")
    server.run()
    trace.write_text("stopped")
