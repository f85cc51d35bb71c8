"""The kernel bench's rows as a table for people and as an object for programs. Measures nothing."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qwen_mlx.bench.chips import CHIPS, Chip
from qwen_mlx.bench.kernel_problems import PLAIN, Problem
from qwen_mlx.bench.kernel_timing import Measured, winner
from qwen_mlx.bench.kernel_traffic import Traffic
from qwen_mlx.bench.table import aligned
from qwen_mlx.kernels.random_inputs import AttentionSizes, Sizes

LEGEND = """\
must move: each byte of inputs and outputs once. distinct: each byte that the kernel reads and each that it writes,
once, as the emulator counted. all lanes: every load and store of every lane, counted there; what the lanes of a
SIMD-group have in common counts for each, so fewer bytes reach the caches. *: counted at 16 and 32 tokens, and extended
exactly. M1 to M5 Max (GPU cores where they matter): a prediction, no measurement: the microseconds that the bytes which
must move take at the bandwidth published for the chip."""


@dataclass(frozen=True)
class Row:
    """One kernel at one number of tokens. `traffic` is None where it was not counted, `measured` empty off Metal."""

    models: str
    problem: Problem
    traffic: Traffic | None
    measured: dict[str, Measured]


def title(models: str, sizes: Sizes | AttentionSizes) -> str:
    dtype = str(sizes.dtype).removeprefix("mlx.core.")
    if isinstance(sizes, AttentionSizes):
        heads = f"{sizes.query_heads} query and {sizes.kv_heads} key heads x {sizes.head_dim}"
        return f"{models}: hidden size {sizes.hidden_size}; {heads}, {sizes.rotary_dim} rotated; {dtype}"
    heads = f"{sizes.key_heads} key heads x {sizes.key_dim}, {sizes.value_heads} value heads x {sizes.value_dim}"
    return f"{models}: {heads}; {sizes.channels} channels in {dtype}, {sizes.taps} taps"


def bytes_table(rows: Sequence[Row]) -> list[str]:
    """Bytes and floors of every row, and which of them plain MLX serves."""
    head = ["kernel", "tokens", "must move", "distinct", "all lanes", *(chip.label for chip in CHIPS)]
    cells = [
        [
            row.problem.kernel.label,
            f"{row.problem.tokens} {row.problem.note}".strip(),
            _size(row.problem.bytes_to_move),
            *_moved(row.traffic),
            *(_time(chip.floor_us(row.problem.bytes_to_move)) for chip in CHIPS),
        ]
        for row in rows
    ]
    return [*aligned([head, *cells], left=0), *_unserved(rows)]


def times_table(rows: Sequence[Row], chip: Chip | None) -> list[str]:
    """Of every form that was measured: microseconds, its share of the chip's bandwidth, and the winner of its row."""
    head = ["kernel", "tokens", "form", "us", "bandwidth", ""]
    lines, troubles = [head], []
    for row in rows:
        best = winner(row.measured)
        for name, one in row.measured.items():
            tokens = f"{row.problem.tokens} {row.problem.note}".strip()
            if one.seconds is None:
                troubles.append(f"{name} at {tokens} tokens is not timed: {one.trouble}.")
                continue
            part = share(row, name, chip)
            lines.append(
                [
                    row.problem.kernel.label,
                    tokens,
                    name,
                    _time(1e6 * one.seconds),
                    "-" if part is None else f"{part:.0%}",
                    "winner" if name == best else "",
                ]
            )
    return aligned(lines, left=0) + troubles


def share(row: Row, form: str, chip: Chip | None) -> float | None:
    """Of the chip's bandwidth: the bytes that must move, over the time of `form`."""
    seconds = row.measured[form].seconds
    return None if chip is None or seconds is None else chip.floor_us(row.problem.bytes_to_move) / (1e6 * seconds)


def as_object(row: Row, chip: Chip | None) -> dict[str, Any]:
    """A row of the JSON object; times in microseconds."""
    problem, traffic = row.problem, row.traffic
    return {
        "models": row.models,
        "kernel": problem.kernel.label,
        "tokens": problem.tokens,
        "served_by": problem.kernel.label if problem.fits else PLAIN,
        "bytes_must_move": problem.bytes_to_move,
        "bytes_moved_distinct": traffic and traffic.distinct,
        "bytes_moved_by_all_lanes": traffic and traffic.lanes,
        "counted_at_tokens": traffic and traffic.counted_at,
        "predicted_floor_us": {chip.label: round(chip.floor_us(problem.bytes_to_move), 3) for chip in CHIPS},
        "measured": {
            name: {
                "us": one.seconds and round(1e6 * one.seconds, 3),
                "share_of_bandwidth": (part := share(row, name, chip)) and round(part, 4),
                "trouble": one.trouble or None,
            }
            for name, one in row.measured.items()
        },
        "winner": winner(row.measured),
    }


def _unserved(rows: Sequence[Row]) -> list[str]:
    """A sentence on the kernels that are not written for these sizes."""
    unserved = dict.fromkeys(row.problem.kernel.label for row in rows if not row.problem.fits)
    if unserved and not any(row.problem.fits for row in rows):
        return ["No kernel fits this shape: plain MLX serves it."]
    return [f"Plain MLX serves this shape instead of {', '.join(unserved)}, which do not fit it."] if unserved else []


def _moved(traffic: Traffic | None) -> list[str]:
    if traffic is None:
        return ["-", "-"]
    extended = "*" if len(traffic.counted_at) > 1 else ""
    return [_size(traffic.distinct) + extended, _size(traffic.lanes) + extended]


def _size(count: int) -> str:
    return f"{count / 2**20:.2f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"


def _time(microseconds: float) -> str:
    return f"{microseconds:.0f}" if microseconds >= 100 else f"{microseconds:.3g}"
