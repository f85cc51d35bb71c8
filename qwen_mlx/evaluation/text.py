"""The text that models are measured on: the built-in sample or a file, cut into windows of tokens.

The sample, calibration.txt beside this module, was written for this project and carries its licence (Apache-2.0). It
holds a little of everything that a model is asked for: prose, dialogue, code, JSON, tool calls, sums, many languages.
"""

from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx

from qwen_mlx.errors import PromptError

SAMPLE = Path(__file__).parent / "calibration.txt"
WINDOW = 512  # tokens


def read_text(file: Path | None = None) -> str:
    """The text of `file`, or the built-in sample.

    Raises PromptError for a file that is not UTF-8 or holds no text, OSError for one that cannot be read.
    """
    file = file or SAMPLE
    data = file.read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(
            f"{file} is not UTF-8 text: byte {data[error.start]:#04x} at place {error.start}; give a text file."
        ) from None
    if not text.strip():
        raise PromptError(f"{file} holds no text; give a file with a few hundred words.")
    return text


def cut_windows(tokens: Sequence[int], size: int = WINDOW) -> list[mx.array]:
    """Token ids -> windows [T] of `size` tokens, the last one shorter; a rest of one token predicts nothing and goes.

    Raises PromptError if there is no window of two tokens, ValueError for a `size` below 2.
    """
    if size < 2:
        raise ValueError(f"The window size must be at least 2 tokens, not {size}: the first one is not predicted.")
    pieces = [list(tokens[start : start + size]) for start in range(0, len(tokens), size)]
    windows = [mx.array(piece) for piece in pieces if len(piece) > 1]
    if not windows:
        raise PromptError(f"A text of {len(tokens)} tokens leaves nothing to predict; give at least two tokens.")
    return windows
