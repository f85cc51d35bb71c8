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
    # Imported when it is asked for, so that the help needs no MLX.
    if args.bench == "kernels":
        from qwen_mlx.bench.kernels import main as bench
    elif args.bench == "launches":
        from qwen_mlx.bench.launches import main as bench
    else:
        from qwen_mlx.bench.model import main as bench
    bench(args.options)
