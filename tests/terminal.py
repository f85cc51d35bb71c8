"""A terminal for a command under test: a pty of its own, and a person who types there and reads."""

import codecs
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Sequence


class Terminal:
    """The command in a terminal of its own: what is typed there, and what it shows."""

    def __init__(self, command: Sequence[str], *, columns: int = 100, rows: int = 30) -> None:
        self.master, slave = pty.openpty()
        self.resize(columns, rows)
        environment = os.environ | {"TERM": "xterm", "INPUTRC": os.devnull}
        for name in ("COLUMNS", "LINES"):  # would count for more than the terminal's own size
            environment.pop(name, None)
        self.process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment,
            preexec_fn=_own_terminal,
        )
        os.close(slave)
        self._decoder, self._half = codecs.getincrementaldecoder("utf-8")("replace"), ""
        self.raw = ""
        """All that was shown, the sequences that move the cursor and erase among it."""
        self.shown = ""
        """Without these, what `until` has not returned yet."""

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, text: str) -> None:
        data = text.encode()
        while data:
            ready, writable, _ = select.select([self.master], [self.master], [], 60)
            if ready:
                self.read()
            if writable:
                data = data[os.write(self.master, data[:512]) :]

    def interrupt_until(self, shown: str) -> None:
        """Ctrl-C until `shown` is: input() misses one that comes just before it begins to wait for a key."""
        for _ in range(60):
            self.type("\x03")
            end = time.monotonic() + 1
            while time.monotonic() < end and shown not in self.shown:
                if select.select([self.master], [], [], 0.1)[0]:
                    self.read()
            if shown in self.shown:
                break
        self.until(shown)

    def until(self, pattern: str) -> str:
        """Wait for `pattern` in what was shown since the last call; returns what was shown up to it."""
        end = time.monotonic() + 90
        while not (found := re.search(pattern, self.shown, re.DOTALL)):
            assert time.monotonic() < end, self.shown
            if select.select([self.master], [], [], 1)[0]:
                self.read()
        before, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return before

    def read(self) -> None:
        try:
            new = os.read(self.master, 65536)
        except OSError as error:  # on Linux, when nobody has the other side open any more
            raise AssertionError(self.shown) from error
        text = self._half + self._decoder.decode(new)
        whole = re.sub(r"\x1b(\[[0-9;?]*)?\Z", "", text)
        self._half = text[len(whole) :]
        self.raw += whole
        self.shown += re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", whole)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.master)


def _own_terminal() -> None:
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
