"""Messages to prompt text, and reply to parts; `python -m qwen_mlx.chat` is a conversation."""

import importlib
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """The command. It stands above everything else, this package below: hence by name."""
    importlib.import_module("qwen_mlx.repl").main(arguments)
