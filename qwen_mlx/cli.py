"""What all commands share: exit codes, errors as one sentence, the prompt from stdin, progress on stderr.

0 done, 2 something was wrong with the request or the files, 130 Ctrl-C. Knows no command.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import NoReturn

from qwen_mlx.errors import PromptError, QwenMLXError


class Parser(argparse.ArgumentParser):
    """argparse whose complaint is one sentence."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def run(main: Callable[[], None]) -> int:
    """Call `main` and return the exit code of the process, having said on stderr what went wrong."""
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Python would try to flush the closed pipe once more on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print("error: nobody reads the output any more; stopped.", file=sys.stderr)
        return 2
    except QwenMLXError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def read_prompt(prompt: str | None) -> str:
    """`prompt`, or all of stdin for "-" and, where stdin is not a terminal, for None."""
    if prompt is None and sys.stdin.isatty():
        raise PromptError("There is no prompt; give one with --prompt, or pipe it in.")
    if prompt not in (None, "-"):
        return str(prompt)
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(
            f"The prompt on stdin is not UTF-8 text: byte {error.object[error.start]:#04x} at place {error.start}."
        ) from None


class Progress:
    """How far a piece of work is, on stderr, once it has taken a second: one line rewritten on a terminal, else a line
    every five seconds."""

    def __init__(self, what: str) -> None:
        self.what = what
        self._start = self._said = time.monotonic()
        self._open = False

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def update(self, done: int, total: int) -> None:
        now = time.monotonic()
        line = f"{self.what}: {done} of {total} tokens"
        if now - self._start < 1:
            return
        if sys.stderr.isatty():
            print(f"\r{line}\x1b[K", end="", file=sys.stderr, flush=True)
            self._open = True
        elif now - self._said >= 5:
            print(line, file=sys.stderr, flush=True)
            self._said = now

    def close(self) -> None:
        """Clear the line that is being rewritten."""
        if self._open:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            self._open = False
