"""`python -m qwen_mlx.bench kernels`: what every Metal kernel moves, how fast that can be, and on a Mac how fast it is.

Off Metal it times nothing, as a CPU's times say nothing about a Mac. The last line of stdout is one JSON object.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version

import mlx.core as mx

from qwen_mlx.bench.chips import CHIPS, Chip, recognise
from qwen_mlx.bench.kernel_problems import ATTENTION_CASES, CASES, Maker
from qwen_mlx.bench.kernel_report import LEGEND, Row, as_object, bytes_table, times_table, title
from qwen_mlx.bench.kernel_timing import measure
from qwen_mlx.bench.kernel_traffic import NoEmulator, Traffic, lengths_to_count, traffic
from qwen_mlx.cli import Parser, Progress, positive
from qwen_mlx.kernels import backend
from qwen_mlx.kernels.random_inputs import AttentionSizes, Sizes

Shape = Sizes | AttentionSizes
TAPS = 4
LARGEST = 256
# In their linear attention 0.8B and 2B have the same heads, and 4B and 9B have; they differ in hidden size and layers,
# which no kernel here sees.
SHAPES: dict[str, Shape] = {
    "0.8B, 2B": Sizes(16, 16, 128, 128, TAPS, mx.bfloat16),
    "4B, 9B": Sizes(16, 32, 128, 128, TAPS, mx.bfloat16),
    "0.8B": AttentionSizes(1024, 8, 2, 256, 64, mx.bfloat16),
    "2B": AttentionSizes(2048, 8, 2, 256, 64, mx.bfloat16),
    "4B": AttentionSizes(2560, 16, 4, 256, 64, mx.bfloat16),
    "9B": AttentionSizes(4096, 16, 4, 256, 64, mx.bfloat16),
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = _parser()
    args = parser.parse_args(arguments)
    shapes = _shapes(parser, args)
    on_metal = backend.gpu_generation() is not None
    name = str(mx.device_info()["device_name"])
    chip = recognise(name) if on_metal else None
    rows = _rows(shapes, args.rounds if on_metal else 0)
    if on_metal:
        print(
            "The bytes that kernels move are counted where there is no Metal: on Linux, in a checkout.", file=sys.stderr
        )
        if chip is None:
            print(f"The bandwidth of {name} is not in the table, so no share of it is told.", file=sys.stderr)
    _print_tables(shapes, rows, chip)
    print(
        json.dumps(
            {
                "bench": "kernels",
                "device": name,
                "metal": on_metal,
                "mlx": version("mlx"),
                "rounds": args.rounds if on_metal else 0,
                "chips": {chip.label: asdict(chip) for chip in CHIPS},
                "rows": [as_object(row, chip) for row in rows],
            }
        )
    )


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="qwen-mlx bench kernels",
        description="The bytes that every Metal kernel must move and moves, the time that takes at least on Apple's "
        "chips, and, on a Mac, the time that it and its rivals take. Without sizes: those of 0.8B, 2B, 4B and 9B.",
    )
    add = parser.add_argument
    add("--key-heads", type=positive, help="of another shape (default: 16, if another size is given)")
    add("--value-heads", type=positive, help="a multiple of the key heads (default: the key heads)")
    add("--key-dim", type=positive, help="size of a key head (default: 128)")
    add("--value-dim", type=positive, help="size of a value head (default: 128)")
    add("--rounds", type=positive, default=15, help="times that every form is measured, on a Mac (default: 15)")
    return parser


def _shapes(parser: argparse.ArgumentParser, args: argparse.Namespace) -> dict[str, Shape]:
    given = {name: getattr(args, name) for name in ("key_heads", "value_heads", "key_dim", "value_dim")}
    if not any(given.values()):
        return SHAPES
    for name, value in given.items():
        if value is not None and value > LARGEST:
            parser.error(f"--{name.replace('_', '-')} is {value}; at most {LARGEST} is measured")
    key_heads = args.key_heads or 16
    value_heads = args.value_heads or key_heads
    if value_heads % key_heads:
        parser.error(f"--value-heads is {value_heads}, which is no multiple of {key_heads} key heads")
    sizes = Sizes(key_heads, value_heads, args.key_dim or 128, args.value_dim or 128, TAPS, mx.bfloat16)
    return {"the shape given": sizes}


def _rows(shapes: dict[str, Shape], rounds: int) -> list[Row]:
    """Every kernel of every shape: timed over `rounds` if there are any, else counted."""
    cases = [(models, sizes, make, T) for models, sizes in shapes.items() for make, T in _cases(sizes)]
    steps = [sum(lengths_to_count(T)) if not rounds else T for *_, T in cases]
    counter = _Counter()
    rows = []
    with Progress("Timing" if rounds else "Counting on the emulator") as progress:
        for done, (models, sizes, make, T) in enumerate(cases):
            progress.update(sum(steps[:done]), sum(steps))
            problem = make(sizes, T)
            measured = measure(problem, rounds) if rounds else {}
            counted = counter.count(make, sizes, T) if problem.fits and not rounds else None
            rows.append(Row(models, problem, counted, measured))
    if counter.complaint:
        print(counter.complaint, file=sys.stderr)
    return rows


def _cases(sizes: Shape) -> Sequence[tuple[Maker, int]]:
    return CASES if isinstance(sizes, Sizes) else ATTENTION_CASES


class _Counter:
    """Counts until there turns out to be no emulator, and keeps why."""

    def __init__(self) -> None:
        self.complaint = ""

    def count(self, make: Maker, sizes: Shape, tokens: int) -> Traffic | None:
        if self.complaint:
            return None
        try:
            return traffic(make, sizes, tokens)
        except NoEmulator as error:
            self.complaint = str(error)
            return None


def _print_tables(shapes: dict[str, Shape], rows: Sequence[Row], chip: Chip | None) -> None:
    for models, sizes in shapes.items():
        own = [row for row in rows if row.models == models]
        print(title(models, sizes), *bytes_table(own), "", sep="\n")
        if any(row.measured for row in own):
            print(
                f"Measured on {chip.name if chip else 'this Mac'}, a run in microseconds:",
                *times_table(own, chip),
                "",
                sep="\n",
            )
    print(LEGEND)
