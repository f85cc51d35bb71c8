"""`python -m qwen_mlx.perplexity`: how well a model predicts a text, and how far it is from the model it was made of.

Activations are float32 for both models, so that nothing but the weights differs.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx

from qwen_mlx.cli import Parser, Progress, positive, run
from qwen_mlx.errors import TokenizerError
from qwen_mlx.evaluation.models import compare, perplexity
from qwen_mlx.evaluation.text import WINDOW, cut_windows, read_text
from qwen_mlx.hub import DEFAULT_MODEL
from qwen_mlx.load import load
from qwen_mlx.model.qwen import Qwen
from qwen_mlx.tokenizer import Tokenizer

LABELS = {
    "tokens": "tokens predicted",
    "perplexity": "perplexity",
    "perplexity_reference": "perplexity of the reference",
    "kl_mean": "KL from the reference, mean",
    "kl_p999": "KL from the reference, 99.9 %",
    "top1_agreement": "same likeliest token",
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = _parser()
    args = parser.parse_args(arguments)
    if args.window < 2:
        parser.error("--window must be at least 2: the first token of a window is not predicted")
    text = read_text(args.text)
    model, tokenizer = load(args.model, dtype="float32")
    tokens = _encode(args.model, model, tokenizer, text)
    if args.kl:
        reference, other = load(args.kl, dtype="float32")
        if other.vocab_size != tokenizer.vocab_size or _encode(args.kl, reference, other, text) != tokens:
            raise TokenizerError(
                f"{args.model} and {args.kl} do not have one vocabulary ({tokenizer.vocab_size} and "
                f"{other.vocab_size} tokens), so their predictions cannot be compared; give the model it was made of."
            )
    windows = cut_windows(tokens[: args.max_tokens], args.window)
    found: dict[str, Any]
    with Progress("Measuring") as progress:
        if args.kl:
            vocab_size = tokenizer.vocab_size
            found = asdict(compare(reference, model, windows, vocab_size=vocab_size, progress=progress.update))
        else:
            found = _alone(model, windows, tokenizer.vocab_size, progress)
    _print(args, found)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="qwen-mlx perplexity", description="Measure how well a model predicts a text.")
    add = parser.add_argument
    add("--model", default=DEFAULT_MODEL, help=f'folder, hub id, or "demo" (default: {DEFAULT_MODEL})')
    add("--text", type=Path, help="a UTF-8 text file (default: the built-in sample)")
    add("--kl", metavar="REFERENCE", help="a model of the same vocabulary to measure the divergence from")
    add("--window", type=positive, default=WINDOW, help=f"tokens read from an empty state (default: {WINDOW})")
    add("--max-tokens", "-m", type=positive, help="read this many tokens of the text (default: all)")
    add("--json", action="store_true", help="print one JSON object instead of the table")
    return parser


def _encode(name: str, model: Qwen, tokenizer: Tokenizer, text: str) -> list[int]:
    if tokenizer.vocab_size > model.config.text.vocab_size:
        raise TokenizerError(
            f"The tokenizer of {name} has {tokenizer.vocab_size} tokens and the model only "
            f"{model.config.text.vocab_size}: they belong to different models."
        )
    return tokenizer.encode(text)


def _alone(model: Qwen, windows: list[mx.array], vocab_size: int, progress: Progress) -> dict[str, Any]:
    count = sum(window.size - 1 for window in windows)
    return {
        "tokens": count,
        "perplexity": perplexity(model, windows, vocab_size=vocab_size, progress=progress.update),
    }


def _print(args: argparse.Namespace, found: dict[str, Any]) -> None:
    if args.json:
        text = None if args.text is None else str(args.text)
        print(json.dumps({"model": args.model, "reference": args.kl, "text": text, "window": args.window, **found}))
        return
    width = max(len(label) for name, label in LABELS.items() if name in found)
    for name, label in LABELS.items():
        if name in found:
            print(f"{label:{width}}  {_shown(name, found[name])}")


def _shown(name: str, value: float) -> str:
    if name == "tokens":
        return f"{value:,}"
    return f"{value:.2%}" if name == "top1_agreement" else f"{value:.5g}"


if __name__ == "__main__":
    sys.exit(run(main))
