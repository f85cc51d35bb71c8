"""`python -m qwen_mlx VERB` and the `qwen-mlx` script: hand the rest of the line to that verb's module."""

import importlib
import sys

from qwen_mlx import __version__
from qwen_mlx.cli import Parser, run

VERBS = {
    "generate": "write a text with a Qwen3.5 model",
    "chat": "talk with a Qwen3.5 model in the terminal",
    "cache_prompt": "compute the beginning of prompts once, into a file",
    "info": "tell what a model is, how it would run here, and the memory it takes",
    "verify": "hold speculative decoding against plain decoding",
    "perplexity": "measure how well a model predicts a text",
    "bench": "measure what the package is made of",
    "convert": "pull, quantize, prove and publish a checkpoint",
    "upload": "publish a converted model on the hub",
}


def _usage() -> str:
    verbs = "\n".join(f"  {verb:12} {what}" for verb, what in VERBS.items())
    return f"usage: qwen-mlx VERB [options]\n\n{verbs}\n\nqwen-mlx VERB --help tells the options of a verb."


def main() -> int:
    return run(lambda: _dispatch(sys.argv[1:]))


def _dispatch(arguments: list[str]) -> None:
    verb, *rest = arguments or [""]
    if verb in ("-h", "--help"):
        print(_usage())
    elif verb == "--version":
        print(f"qwen-mlx {__version__}")
    elif verb in VERBS:
        importlib.import_module(f"qwen_mlx.{verb}").main(rest)
    else:
        wrong = f"there is no verb {verb}" if verb else "a verb is missing"
        Parser(prog="qwen-mlx", description="").error(f"{wrong}; the verbs are {', '.join(VERBS)}")


if __name__ == "__main__":
    sys.exit(main())
