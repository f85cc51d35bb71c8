"""From the start of a command to its first token: a fresh process of each engine, the files warm in the cache.

Each engine starts as its own command does; mlx-lm's has no option for the dtype.
"""

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from qwen_mlx.bench.model_figures import alternate

PROMPT = "Once upon a time"
LIMIT_S = 120
"""An engine whose first start takes longer is not timed."""


class NoStart(Exception):
    """A command that wrote no token; says why."""


@dataclass(frozen=True)
class Command:
    """What stands on stdout before the first token is `banner`."""

    arguments: list[str]
    banner: bytes = b""


@dataclass
class Starts:
    """`seconds` of every repetition; empty where there is a `reason`."""

    seconds: list[float] = field(default_factory=list)
    reason: str = ""


def commands(folder: Path, dtype: str, *, peer: bool) -> dict[str, Command]:
    """Of the engines by name, both with one prompt and one greedy token, without the chat template."""
    options = ["--model", str(folder), "--prompt", PROMPT, "--max-tokens", "1", "--temp", "0"]
    ours = Command([sys.executable, "-m", "qwen_mlx.generate", *options, "--raw", "--dtype", dtype])
    theirs = Command([sys.executable, "-m", "mlx_lm", "generate", *options, "--ignore-chat-template"], b"==========\n")
    return {"qwen_mlx": ours, "mlx-lm": theirs} if peer else {"qwen_mlx": ours}


def measure_starts(
    wanted: dict[str, Command], repetitions: int, progress: Callable[[int, int], None]
) -> dict[str, Starts]:
    """Every command `repetitions` times, in turn, after one start that is not counted."""
    starts = {name: Starts() for name in wanted}
    total = (repetitions + 1) * len(wanted)
    progress(0, total)
    done = 0
    for repetition, names in enumerate(alternate(list(wanted), repetitions + 1)):
        for name in names:
            done += 1
            if starts[name].reason:
                continue
            try:
                taken = first_token(wanted[name])
            except NoStart as error:
                starts[name] = Starts(reason=str(error))
                continue
            if repetition:
                starts[name].seconds.append(taken)
            progress(done, total)
    return starts


def first_token(command: Command) -> float:
    """Seconds until a byte follows the banner on stdout. Raises NoStart."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
    with tempfile.TemporaryFile() as complaints:
        start = time.perf_counter()
        process = subprocess.Popen(
            command.arguments,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=complaints,
            env=environment,
        )
        limit = threading.Timer(LIMIT_S, process.kill)
        limit.start()
        try:
            seen = _read(process, len(command.banner) + 1)
            taken = time.perf_counter() - start
        finally:
            limit.cancel()
            # It has nothing more to tell.
            process.kill()
            process.communicate()
        if len(seen) > len(command.banner):
            return taken
        if taken >= LIMIT_S:
            raise NoStart(f"no token within {LIMIT_S} s")
        complaints.seek(0)
        lines = complaints.read().decode("utf-8", errors="replace").split("\n")
        raise NoStart(next((line.strip() for line in reversed(lines) if line.strip()), "it ended without a token"))


def _read(process: "subprocess.Popen[bytes]", count: int) -> bytes:
    """The first `count` bytes of stdout, fewer if it ends."""
    assert process.stdout is not None
    seen = b""
    while len(seen) < count and (more := process.stdout.read(1)):
        seen += more
    return seen
