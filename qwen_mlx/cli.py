"""What all commands share: exit codes, errors as one sentence, the prompt from stdin, progress on stderr.

0 done, 2 something was wrong with the request or the files, 130 Ctrl-C. Knows no command.
"""

import argparse
import atexit
import math
import os
import signal
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
    _open_standard_descriptors()
    if sys.stdout is None:
        return _fail("stdout is closed, so there is nowhere to write to.")
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
        try:
            main()
            sys.stdout.flush()
        except KeyboardInterrupt:
            return _interrupted()
        except QwenMLXError as error:
            return _fail(str(error))
        except UnicodeEncodeError as error:
            letter = ascii(error.object[error.start])
            return _fail(f"the output's encoding {error.encoding} has no {letter}; set PYTHONUTF8=1 or use --json.")
        except OSError as error:
            return _fail(_what_happened(error))
    return 0


def _open_standard_descriptors() -> None:
    """What was closed at the start leads to /dev/null: else the next file that is opened gets its number, which MLX
    takes for a failure, and print, told to write to a stderr that is None, writes to stdout."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free: this one
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", closefd=False)


def _interrupted() -> int:
    # A second Ctrl-C would break off the sentence, or end by signal a process that is on its way out.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    print("Interrupted.", file=sys.stderr)
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGINT, handler)
    return 130


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
    if prompt is not None and prompt != "-":
        # Python keeps what is not UTF-8 on the command line as surrogates.
        return _decoded(prompt.encode("utf-8", "surrogateescape"), "The prompt")
    if sys.stdin is None or (prompt is None and sys.stdin.isatty()):
        raise PromptError("There is no prompt; give one with --prompt, or pipe it in.")
    return _decoded(sys.stdin.buffer.read(), "The prompt on stdin").removeprefix("\ufeff")  # the mark of some editors


def _decoded(data: bytes, what: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(
            f"{what} is not Unicode text in UTF-8: byte {data[error.start]:#04x} at place {error.start}."
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
            if self._timer.ident is None:  # a slow beginning may be told more than once
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
