"""A message as it is typed into a terminal, or pasted."""

import os
import select
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager


def read_message() -> str:
    """A message from the terminal: a line and those that it goes on in, or a paste. EOFError when there are no more."""
    import readline  # lines can be edited, and earlier ones come back

    def line(begun: str = "") -> str:
        readline.set_startup_hook(lambda: readline.insert_text(begun))
        try:
            return input("… ")
        finally:
            readline.set_startup_hook(None)

    with _lines_of_any_length():
        text = input("> ")
        try:
            while (pasted := _arrived()) or text.endswith("\\"):
                if not pasted:
                    text = text.removesuffix("\\")
                    text += "\n" + line()
                    continue
                *whole, begun = pasted.split("\n")
                text = "\n".join([text, *whole])
                if begun:
                    print("\r", end="")
                    text += "\n" + line(begun)
        except EOFError:
            pass
    return text


@contextmanager
def _lines_of_any_length() -> Iterator[None]:
    """A terminal that puts lines together itself loses what goes beyond the 4,096th byte of one."""
    if not sys.stdout.isatty():  # then input() leaves the editing to the terminal
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    changed = [*before[:3], before[3] & ~termios.ICANON, *before[4:6], [*before[6]]]
    changed[6][termios.VMIN], changed[6][termios.VTIME] = 1, 0
    termios.tcsetattr(sys.stdin, termios.TCSANOW, changed)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)


def _arrived() -> str:
    """What came in behind a line, until for a moment nothing more does."""
    arrived = bytearray()
    while select.select([sys.stdin], [], [], 0.02)[0] and (more := os.read(sys.stdin.fileno(), 65536)):
        arrived += more
    return arrived.decode(errors="replace").replace("\r", "\n")  # the line editor has the key as it is
