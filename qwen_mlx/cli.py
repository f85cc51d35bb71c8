"""What all commands share: exit codes, errors as one sentence, the prompt from stdin, progress on stderr.

0 done, 2 something was wrong with the request or the files, 130 Ctrl-C. Knows no command.
"""

import argparse
import math
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable
from types import TracebackType
from typing import NoReturn

from qwen_mlx.errors import PromptError, QwenMLXError


class Parser(argparse.ArgumentParser):
    """argparse whose complaint is one sentence, and whose flags are written out."""

    def __init__(self, *, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def positive(text: str) -> int:
    """A flag's integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer, at least 1, not {text}")
    return int(text)


def run(main: Callable[[], None]) -> int:
    """Call `main` and return the exit code of the process, having said on stderr what went wrong."""
    if sys.stdout is None:
        return _fail("stdout is closed, so there is nowhere to write to.")
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
        try:
            main()
            sys.stdout.flush()
        except KeyboardInterrupt:
            print("Interrupted.", file=sys.stderr)
            return 130
        except QwenMLXError as error:
            return _fail(str(error))
        except UnicodeEncodeError as error:
            letter = ascii(error.object[error.start])
            return _fail(f"the output's encoding {error.encoding} has no {letter}; set PYTHONUTF8=1 or use --json.")
        except OSError as error:
            return _fail(_what_happened(error))
    return 0


def _fail(sentence: str) -> int:
    print(f"error: {sentence}", file=sys.stderr)
    return 2


def _what_happened(error: OSError) -> str:
    if error.filename is not None:
        return f"{error.filename}: {error.strerror}."
    # It was stdout: Python would try to flush it once more on its way out, and complain.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if isinstance(error, BrokenPipeError):
        return "nobody reads the output any more; stopped."
    return f"the output cannot be written: {error.strerror}."


def read_prompt(prompt: str | None) -> str:
    """`prompt`, or all of stdin for "-" and, where stdin is not a terminal, for None."""
    if prompt not in (None, "-"):
        return str(prompt)
    if sys.stdin is None or (prompt is None and sys.stdin.isatty()):
        raise PromptError("There is no prompt; give one with --prompt, or pipe it in.")
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(
            f"The prompt on stdin is not UTF-8 text: byte {error.object[error.start]:#04x} at place {error.start}."
        ) from None


class Progress:
    """How far a piece of work is, on stderr, once it has taken a second: on a terminal one line that is rewritten, else
    a line then and every five seconds."""

    def __init__(self, what: str) -> None:
        self.what = what
        self._start = time.monotonic()
        self._said = -math.inf
        self._open = False
        self._line = ""
        # The first step may itself take long; then this says that it has begun.
        self._timer = threading.Timer(1, self._say)
        self._timer.daemon = True

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def update(self, done: int, total: int) -> None:
        """Tell that `done` of `total` tokens are through; called with 0 when the work begins."""
        self._line = f"{self.what}: {done} of {total} tokens"
        if done == total:
            self.close()
        elif done == 0:
            self._timer.start()
        elif time.monotonic() - self._start >= 1:
            self._say()

    def _say(self) -> None:
        now = time.monotonic()
        if sys.stderr.isatty():
            print(f"\r{self._line}\x1b[K", end="", file=sys.stderr, flush=True)
            self._open = True
        elif now - self._said >= 5:
            print(self._line, file=sys.stderr, flush=True)
            self._said = now

    def close(self) -> None:
        """Clear the line that is being rewritten."""
        self._timer.cancel()
        if self._timer.is_alive():  # it may be speaking right now
            self._timer.join()
        if self._open:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            self._open = False
