"""`python -m qwen_mlx.bench model MODEL`: how fast a model runs here, and with --against beside another engine.

Speeds, time to first token, memory, start-up, and the share of the bandwidth bound. No speed-up is told where the two
engines do not say the same. The last line of stdout is one JSON object.
"""

import argparse
import hashlib
import json
import os
import platform
import random
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from qwen_mlx import __version__
from qwen_mlx.bench.chips import Chip, recognise
from qwen_mlx.bench.model_agreement import NearTie, near_ties
from qwen_mlx.bench.model_bytes import mean_context, quantization, step_bytes
from qwen_mlx.bench.model_engines import Engine, Ours, Run, timed_run
from qwen_mlx.bench.model_figures import alternate
from qwen_mlx.bench.model_files import require_matplotlib, write_csv, write_plot
from qwen_mlx.bench.model_peer import MlxLM
from qwen_mlx.bench.model_report import Report, Result, as_object, lines
from qwen_mlx.bench.model_startup import Starts, commands, measure_starts
from qwen_mlx.cli import Parser, Progress, positive
from qwen_mlx.errors import PromptError, TokenizerError
from qwen_mlx.hub import resolve
from qwen_mlx.kernels import backend
from qwen_mlx.load import load_model
from qwen_mlx.model.qwen import Qwen
from qwen_mlx.tokenizer import Tokenizer


def main(arguments: Sequence[str] | None = None) -> None:
    parser = _parser()
    args = parser.parse_args(arguments)
    _check(parser, args)
    subject = _open(args)
    prompts = [prompt_tokens(subject.ours.num_real_tokens, length) for length in dict.fromkeys(args.prompt)]
    # Before the weights are read, so that on a small machine only one model at a time is in memory.
    starts = _starts(subject, args)
    mx.eval([engine.model.parameters() for engine in subject.engines])
    ties = _warm_up(subject, prompts, args.generate)
    runs = _measure(subject.engines, prompts, args)
    chip, no_share = _bandwidth()
    results = [
        Result(
            len(prompt),
            prompt_hash(prompt),
            step_bytes(subject.ours.model, mean_context(len(prompt), args.generate)),
            runs[len(prompt)],
            ties[len(prompt)],
        )
        for prompt in prompts
    ]
    report = Report(_about(args, subject), starts, results, chip, no_share)
    print(*lines(report, subject.shown), "", json.dumps(as_object(report)), sep="\n", flush=True)
    if args.csv:
        write_csv(args.csv, report)
    if args.plot:
        write_plot(args.plot, report)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="qwen-mlx bench model",
        description="Prefill and decode speed, time to first token, memory and start-up of a model on this machine.",
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help='folder, hub id, or "demo"')
    add("--against", choices=("mlx-lm",), help="measure this engine too, in turn, and tell the ratio")
    add("-p", "--prompt", type=_tokens, nargs="+", default=[512], metavar="P", help="prompt tokens (default: 512)")
    add("-g", "--generate", type=positive, default=128, metavar="G", help="tokens to generate (default: 128)")
    add("-n", "--repetitions", type=positive, default=5, metavar="N", help="of every measurement (default: 5)")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="dtype of the activations")
    add("--csv", type=Path, metavar="FILE", help="write the raw figures of every run")
    add("--plot", type=Path, metavar="FILE.png", help="draw tok/s over context length; needs qwen-mlx[plot]")
    return parser


def _tokens(text: str) -> int:
    try:
        return positive(text)
    except argparse.ArgumentTypeError as error:
        # -p takes every word up to the next flag.
        raise argparse.ArgumentTypeError(f"{error}; if that is the model, put it first") from None


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """What can be refused before anything is loaded."""
    if args.generate < 2:
        parser.error("-g is 1; the speed of decoding shows between two tokens at least")
    if args.plot:
        if args.plot.suffix != ".png":
            parser.error(f"--plot draws a PNG, so its file must end in .png, not be {args.plot}")
        require_matplotlib()
    for flag, path in (("--csv", args.csv), ("--plot", args.plot)):
        if path and (path.is_dir() or not os.access(path.parent, os.W_OK)):
            parser.error(f"{flag} cannot write {path}: give a file in a folder that exists and may be written to")


@dataclass(frozen=True)
class Subject:
    """What is measured: the model of `folder` in our engine and, if there is one, in the `peer`."""

    folder: Path
    tokenizer: Tokenizer | None
    ours: Ours
    peer: MlxLM | None

    @property
    def engines(self) -> list[Any]:
        return [self.ours, self.peer] if self.peer else [self.ours]

    def shown(self, token: int) -> str:
        """A token as people read it: its id and, where there is a tokenizer, its text."""
        return f"{token} {self.tokenizer.decode([token])!r}" if self.tokenizer else str(token)


def _open(args: argparse.Namespace) -> Subject:
    folder = resolve(args.model)
    model = load_model(folder, dtype=args.dtype)
    # Speed needs no text: a folder of random weights may come without one.
    tokenizer = Tokenizer.load(folder) if (folder / "tokenizer.json").exists() else None
    _check_lengths(model, tokenizer, args)
    real = tokenizer.vocab_size if tokenizer else model.config.text.vocab_size
    return Subject(folder, tokenizer, Ours(model, real), MlxLM(folder, model) if args.against else None)


def _check_lengths(model: Qwen, tokenizer: Tokenizer | None, args: argparse.Namespace) -> None:
    text = model.config.text
    if tokenizer and tokenizer.vocab_size > text.vocab_size:
        raise TokenizerError(
            f"The tokenizer has {tokenizer.vocab_size} tokens and the model only {text.vocab_size}: "
            "they belong to different models."
        )
    longest = max(args.prompt) + args.generate
    if longest > text.max_position_embeddings:
        raise PromptError(
            f"{max(args.prompt)} tokens and {args.generate} more are {longest}; the model takes "
            f"{text.max_position_embeddings} at most."
        )


def prompt_tokens(vocab_size: int, count: int) -> list[int]:
    """The same ids on every machine; a shorter prompt is the beginning of a longer one."""
    draw = random.Random(0).random
    return [int(draw() * vocab_size) for _ in range(count)]


def prompt_hash(tokens: Sequence[int]) -> str:
    """12 hex digits of the SHA-256 of the ids, in decimal with spaces between."""
    return hashlib.sha256(" ".join(map(str, tokens)).encode()).hexdigest()[:12]


def _starts(subject: Subject, args: argparse.Namespace) -> dict[str, Starts]:
    wanted = commands(subject.folder, args.dtype, peer=subject.peer is not None)
    if subject.tokenizer is None:
        return {name: Starts(reason="the folder has no tokenizer.json") for name in wanted}
    with Progress("Starting") as progress:
        return measure_starts(wanted, args.repetitions, progress.update)


def _warm_up(subject: Subject, prompts: Sequence[list[int]], count: int) -> dict[int, list[NearTie]]:
    """Every engine once after every prompt, which is not timed but compared; near ties by length of the prompt."""
    found: dict[int, list[NearTie]] = {}
    total = sum(map(len, prompts)) + count * len(prompts)
    with Progress("Comparing" if subject.peer else "Warming up") as progress:
        done = 0
        progress.update(done, total)
        for prompt in prompts:
            found[len(prompt)] = _compared(subject, prompt, count)
            done += len(prompt) + count
            progress.update(done, total)
    return found


def _compared(subject: Subject, prompt: list[int], count: int) -> list[NearTie]:
    ours = list(subject.ours.steps(prompt, count))
    if subject.peer is None:
        return []
    subject.ours.synchronize()
    theirs = subject.peer.follow(prompt, [token for token, _ in ours])
    exact = subject.ours.model.dtype == mx.float32 and subject.peer.exact_gains
    return near_ties(ours, theirs, exact=exact, prompt_tokens=len(prompt), shown=subject.shown)


def _measure(
    engines: Sequence[Engine], prompts: Sequence[list[int]], args: argparse.Namespace
) -> dict[int, dict[str, list[Run]]]:
    """The runs of every engine, in turn, by length of the prompt."""
    runs: dict[int, dict[str, list[Run]]] = {len(p): {engine.name: [] for engine in engines} for p in prompts}
    jobs = [(e, p) for p in prompts for order in alternate(engines, args.repetitions) for e in order]
    total = sum(len(prompt) + args.generate for _, prompt in jobs)
    with Progress("Measuring") as progress:
        done = 0
        progress.update(done, total)
        for engine, prompt in jobs:
            runs[len(prompt)][engine.name].append(timed_run(engine, prompt, args.generate))
            done += len(prompt) + args.generate
            progress.update(done, total)
    return runs


def _bandwidth() -> tuple[Chip | None, str]:
    """The chip, or why none is known."""
    name = _device()
    if backend.gpu_generation() is None:
        return None, f"MLX runs on the CPU here ({name}), and no bandwidth is published for that"
    chip = recognise(name)
    return chip, "" if chip else f"that of {name} is not in the table"


def _device() -> str:
    return str(mx.device_info()["device_name"])


def _about(args: argparse.Namespace, subject: Subject) -> dict[str, Any]:
    versions = {"qwen-mlx": __version__, "mlx": version("mlx")}
    if subject.peer:
        versions["mlx-lm"] = version("mlx-lm")
    return {
        "model": args.model,
        "device": _device(),
        "metal": backend.gpu_generation() is not None,
        "platform": platform.platform(),
        "versions": {**versions, "python": platform.python_version()},
        "preloaded": os.environ.get("LD_PRELOAD", ""),
        "dtype": str(subject.ours.model.dtype).removeprefix("mlx.core."),
        "quantization": quantization(subject.ours.model),
        "generated_tokens": args.generate,
        "repetitions": args.repetitions,
    }
