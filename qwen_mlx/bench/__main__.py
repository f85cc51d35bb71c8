"""`python -m qwen_mlx.bench`."""

import sys

from qwen_mlx.bench import main
from qwen_mlx.cli import run

if __name__ == "__main__":
    sys.exit(run(main))
