"""A conversation with a tool, part by part: `python examples/chat.py [model]`."""

import sys

from qwen_mlx import Chat, load


def get_weather(city: str) -> str:
    """Tell the weather of a city."""
    return f"In {city} it is sunny, 21 degrees."


chat = Chat(*load(sys.argv[1] if len(sys.argv) > 1 else "demo"), tools=[get_weather], max_tokens=100)
for part in chat.send("What is the weather in Paris?"):
    print(part)
print(chat.rewind_turn(), "has been taken back; left are", len(chat.messages), "messages.")
