"""What a terminal shows of what is written to it: the part of ECMA-48 that the chat and readline use.

Long lines are wrapped, and wrapped anew when the width changes, as today's terminals do it. Rows that left at the top
can be read, and not be written to any more.
"""

import re

from rich.cells import cell_len

TOKEN = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])|(.)", re.DOTALL)


class Screen:
    """`columns` by `rows` cells, and all that has scrolled out at the top."""

    def __init__(self, columns: int, rows: int) -> None:
        self.columns, self.rows = columns, rows
        self._lines: list[list[str]] = [[]]  # each of cells; a wide character has an empty one behind it
        self._goes_on = [False]  # whether the next is the rest of this one, wrapped
        self._row = self._column = self._top = 0

    @property
    def text(self) -> str:
        """All lines from the first one, those that were wrapped as one."""
        whole = [""]
        for cells, goes_on in zip(self._lines, self._goes_on, strict=True):
            whole[-1] += "".join(cells)
            if not goes_on:
                whole.append("")
        return "\n".join(line.rstrip() for line in whole).rstrip()

    def write(self, text: str) -> None:
        for number, command, character in TOKEN.findall(text):
            if character == "\r":
                self._column = 0
            elif character == "\n":
                self._goes_on[self._row] = False
                self._down()
            elif character >= " ":
                self._put(character)
            elif command == "A":
                self._row = max(self._top, self._row - int(number or 1))
            elif command in ("J", "K") and number in ("", "0"):
                self._erase(command)
            else:
                assert command in ("m", "h", "l") or character == "\a", (number, command, character)

    def resize(self, columns: int, rows: int) -> None:
        line, offset = self._goes_on[: self._row].count(False), self._column
        above = self._row
        while above and self._goes_on[above - 1]:
            above -= 1
            offset += len(self._lines[above])
        whole = [list[str]()]
        for cells, goes_on in zip(self._lines, self._goes_on, strict=True):
            whole[-1] += cells
            if not goes_on:
                whole.append([])
        self.__init__(columns, rows)  # type: ignore[misc]
        for number, cells in enumerate(whole[:-1]):
            if number:
                self._down()
            first = self._row
            for cell in cells:
                if cell:
                    self._put(cell)
            if number == line:
                rows_down = max(0, offset - 1) // columns
                here = first + rows_down, offset - rows_down * columns
        self._row, self._column = here

    def _put(self, character: str) -> None:
        width = cell_len(character)
        if not width:
            cells = self._lines[self._row][: self._column]
            place = next((i for i in reversed(range(len(cells))) if cells[i]), 0)
            self._lines[self._row][place] += character
            return
        if self._column + width > self.columns:
            self._goes_on[self._row] = True
            self._down()
            self._column = 0
        cells = self._lines[self._row]
        cells += " " * (self._column - len(cells))
        cells[self._column : self._column + width] = [character, *[""] * (width - 1)]
        self._column += width

    def _down(self) -> None:
        self._row += 1
        if self._row == len(self._lines):
            self._lines.append([])
            self._goes_on.append(False)
            self._column = 0
        self._top = max(self._top, self._row + 1 - self.rows)

    def _erase(self, command: str) -> None:
        del self._lines[self._row][self._column :]
        if command == "J":
            del self._lines[self._row + 1 :], self._goes_on[self._row + 1 :]
        self._goes_on[self._row] = False
