"""The benches: `python -m qwen_mlx.bench WORD` hands the rest of the line to that word's module."""

import argparse
from collections.abc import Sequence

from qwen_mlx.cli import Parser

BENCHES = {
    "kernels": "bytes, time floors and, on a Mac, times of every Metal kernel",
    "launches": "kernels that a decoded token launches on Metal, beside mlx-lm's",
    "model": "speed, memory and start-up of a model, beside mlx-lm if asked for",
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(prog="qwen-mlx bench", description="Measure what the package is made of.")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "benches:\n" + "\n".join(f"  {bench:10} {what}" for bench, what in BENCHES.items())
    parser.add_argument("bench", nargs="?", metavar="BENCH", help="which bench; BENCH --help tells its options")
    parser.add_argument("options", nargs=argparse.REMAINDER, metavar="...", help="options of that bench")
    args = parser.parse_args(arguments)
    if args.bench not in BENCHES:
        wrong = f"there is no bench {args.bench}" if args.bench else "a bench is missing"
        parser.error(f"{wrong}; the benches are {', '.join(BENCHES)}")
    {"kernels": _kernels, "launches": _launches, "model": _model}[args.bench](args.options)


# Imported when they are asked for, so that the help needs no MLX.
def _kernels(options: Sequence[str]) -> None:
    from qwen_mlx.bench import kernels

    kernels.main(options)


def _launches(options: Sequence[str]) -> None:
    from qwen_mlx.bench import launches

    launches.main(options)


def _model(options: Sequence[str]) -> None:
    from qwen_mlx.bench import model

    model.main(options)
