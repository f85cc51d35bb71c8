"""Conversion of checkpoints. Nothing in the runtime imports this package."""

from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """`python -m qwen_mlx.convert` and `qwen-mlx convert`."""
    from qwen_mlx.convert.command import main as convert  # late: a module of this package must not load all others

    convert(arguments)
