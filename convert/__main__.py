"""`python -m qwen_mlx.convert`."""

import sys

from qwen_mlx.cli import run
from qwen_mlx.convert import main

if __name__ == "__main__":
    sys.exit(run(main))
