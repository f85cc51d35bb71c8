"""`python -m qwen_mlx.chat`."""

import sys

from qwen_mlx.chat import main
from qwen_mlx.cli import run

if __name__ == "__main__":
    sys.exit(run(main))
