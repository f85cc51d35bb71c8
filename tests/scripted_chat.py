"""The chat with a model that says what it is told to: `python -m tests.scripted_chat FOLDER [arguments of the chat]`.

FOLDER/script.json has the token ids of its answer, in parts. Before each part it writes FOLDER/N.waiting, and goes on
when FOLDER/N.go is there. Whatever is asked again is answered in the same way.
"""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx

from qwen_mlx.decoding.sampling import Sampler
from qwen_mlx.repl import main

folder = Path(sys.argv[1])


def script() -> Iterator[int]:
    for number, part in enumerate(json.loads((folder / "script.json").read_bytes())):
        (folder / f"{number}.waiting").touch()
        while not (folder / f"{number}.go").exists():
            time.sleep(0.01)
        yield from part


def draw(sampler: Any, logits: mx.array) -> mx.array:
    """The next token of the script, which begins anew with every answer."""
    sampler.script = getattr(sampler, "script", None) or script()
    return mx.array([next(sampler.script, 0)])


if __name__ == "__main__":
    Sampler.__call__ = draw  # type: ignore[method-assign]
    main([*sys.argv[2:], "--model", "demo", "--thinking", "off", "--speculate", "off"])
