"""What the emulator objects to: one `Finding` a place, and the two errors that carry them.

Knows no more than the words; runtime/reports.cpp and the compiler fill them in.
"""

from dataclasses import dataclass

# By the words of runtime/reports.cpp.
KINDS = (
    "out-of-bounds",
    "padding read",
    "write to read-only input",
    "uninitialised threadgroup memory",
    "uninitialised output read",
    "data race (threadgroup memory)",
    "data race (device memory)",
    "data race between threadgroups",
    "divergence",
    "early exit",
    "bad lane",
    "non-uniform argument",
    "atomic order",
    "threadgroup memory limit",
    "private memory leak",
    "output not written",
    "undefined behaviour",
    "misaligned access",
    "time limit",
    "crash",
    "redundant write",
    "write-after-read inside a SIMD-group",
)


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, at its first occurrence. `line` counts in the kernel's text, from 1."""

    kind: str
    message: str
    line: int | None = None
    buffer: str | None = None
    threadgroup: tuple[int, int, int] | None = None
    thread: tuple[int, int, int] | None = None

    def __str__(self) -> str:
        text = f"{self.kind}: {self.message}"
        if self.line is not None:
            text += f", in line {self.line}"
        if self.thread is not None:
            text += f" [threadgroup {self.threadgroup} thread {self.thread}]"
        return text


class MetalEmulatorError(RuntimeError):
    """A kernel that did something wrong; `findings` says what, where and in which thread."""

    def __init__(self, kernel_name: str, findings: list[Finding], text: str = "") -> None:
        lines = text.splitlines()

        def describe(finding: Finding) -> str:
            known = finding.line is not None and 0 < finding.line <= len(lines)
            return f"\n  {finding}" + (f"\n    > {lines[finding.line - 1].strip()}" if known else "")

        super().__init__(f"{kernel_name}: {len(findings)} finding(s)" + "".join(map(describe, findings)))
        self.findings = tuple(findings)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of the findings, each once, in the order of their first occurrence."""
        return tuple(dict.fromkeys(finding.kind for finding in self.findings))


class MetalCompileError(MetalEmulatorError):
    """A text that the compiler ("compile error") or the static check ("static check") does not accept."""
