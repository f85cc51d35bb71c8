"""`python -m qwen_mlx VERB` and the `qwen-mlx` script: hand the rest of the line to that verb's module."""

import importlib
import sys

from qwen_mlx.cli import run

VERBS = {"generate": "write a text with a Qwen3.5 model"}


def _usage() -> str:
    verbs = "\n".join(f"  {verb:10} {what}" for verb, what in VERBS.items())
    return f"usage: qwen-mlx VERB [options]\n\n{verbs}\n\nqwen-mlx VERB --help tells the options of a verb."


def main() -> int:
    verb, *rest = sys.argv[1:] or ["--help"]
    if verb in ("-h", "--help"):
        print(_usage())
        return 0
    if verb == "--version":
        from qwen_mlx import __version__

        print(f"qwen-mlx {__version__}")
        return 0
    if verb not in VERBS:
        print(f"error: there is no verb {verb}; the verbs are {', '.join(VERBS)}.", file=sys.stderr)
        return 2
    module = importlib.import_module(f"qwen_mlx.{verb}")
    return run(lambda: module.main(rest))


if __name__ == "__main__":
    sys.exit(main())
