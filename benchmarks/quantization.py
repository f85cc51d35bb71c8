"""What a bit per weight buys: our recipes beside mlx-lm's on the demo model, by the divergence from its float weights.

    python benchmarks/quantization.py --windows 16

Every matrix is rounded as `mx.quantize` would store it, with bfloat16 scales; activations are float32. The text is
tales from seeds that the demo's training did not use, in windows of 256 tokens (of conversations it has learned the
answers only, so they would measure how it stumbles over questions); `auto` measures on other tales than it is judged
on. At equal size: for every peer's row, `auto` may spend its bits per weight and no more. The peers' recipes use groups
of 64, mlx-lm's default, and once more groups of 128, as ours do. The last line is one JSON object.
"""

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx

from qwen_mlx.cli import Progress
from qwen_mlx.convert.recipes import RECIPES, Form, bits_per_weight, form_of
from qwen_mlx.convert.sensitivity import allocate, in_form, quantizable, sensitivity
from qwen_mlx.evaluation.measures import Comparison
from qwen_mlx.evaluation.models import compare_states
from qwen_mlx.hub import resolve
from qwen_mlx.load import load
from qwen_mlx.model.qwen import Qwen

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "train_demo"))
from text import Windows
from tokenizers import Tokenizer

WINDOW = 256
CALIBRATION, JUDGEMENT = 4001, 6001  # seeds; training used 1, 7 and 999
FORMS = [Form(bits, 128) for bits in (2, 3, 4, 5, 6, 8)]
MIXED = ("mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6")
HEADER = f"{'':24} {'bits':>6} {'KL mean':>9} {'KL 99.9%':>9} {'top-1':>7} {'perplexity':>10}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=16, help="windows to judge on")
    parser.add_argument("--calibration-windows", type=int, default=4, help="windows that auto measures on")
    args = parser.parse_args()
    model, tokenizer = load("demo", dtype="float32")
    judge = Judge(model, held_out(JUDGEMENT, args.windows), tokenizer.vocab_size)
    with Progress("Sensitivities") as progress:
        text = held_out(CALIBRATION, args.calibration_windows)
        losses = sensitivity(model, text, FORMS, vocab_size=tokenizer.vocab_size, progress=progress.update)
    print(HEADER)
    report: dict[str, Any] = {"ours": {}, "peers": {}, "auto_at_the_size_of": {}}
    for name, recipe in RECIPES.items():
        report["ours"][name] = judge(name, {path: form_of(recipe, path, model.config.text) for path in losses})
    for name, forms in peers(model).items():
        peer = report["peers"][name] = judge(f"mlx-lm {name}", forms)
        mine = judge("  auto, same size", allocate(losses, judge.sizes, peer["bits_per_weight"]))
        report["auto_at_the_size_of"][name] = mine
    print("\nAt equal size, the mean KL of auto by that of the peer:")
    for name, peer in report["peers"].items():
        ratio = report["auto_at_the_size_of"][name]["kl_mean"] / peer["kl_mean"]
        print(f"{name:24} {ratio:.2f}{'' if ratio < 1 else '   not lower'}")
    print(json.dumps(report))


def held_out(seed: int, count: int) -> list[mx.array]:
    """Windows of tales that the demo has not read."""
    tokenizer = Tokenizer.from_file(str(resolve("demo") / "tokenizer.json"))
    ids, _ = Windows(tokenizer, seed=seed, tales=1.0, prose=0.0).batch(count, WINDOW)
    return [mx.array(row) for row in ids]


def peers(model: Qwen) -> dict[str, dict[str, Form]]:
    """mlx-lm's recipes for our paths, which are its own but for a prefix."""
    builder: Callable[..., Any] = importlib.import_module("mlx_lm.convert").mixed_quant_predicate_builder
    paths = quantizable(model)
    outline = SimpleNamespace(named_modules=lambda: paths.items(), layers=model.model.layers)
    found = {}
    for group_size in (64, 128):
        found[f"4 bits, {group_size}"] = {path: Form(4, group_size) for path in paths}
        for name in MIXED:
            predicate = builder(name, outline, group_size)
            found[f"{name}, {group_size}"] = {path: Form(**predicate(path, matrix)) for path, matrix in paths.items()}
    return found


class Judge:
    """Rounds the matrices of a model in place, measures, and puts them back."""

    def __init__(self, model: Qwen, windows: list[mx.array], vocab_size: int) -> None:
        self.model, self.windows, self.vocab_size = model, windows, vocab_size
        self.matrices = quantizable(model)
        self.weights = {path: matrix.weight for path, matrix in self.matrices.items()}
        self.sizes = {path: weight.size for path, weight in self.weights.items()}
        self.expected = self._logits()

    def __call__(self, name: str, forms: Mapping[str, Form]) -> dict[str, float]:
        for path, matrix in self.matrices.items():
            matrix.weight = in_form(self.weights[path], forms[path])
        found = compare_states(
            _as_they_are, self.expected, _as_they_are, self._logits(), self.windows, vocab_size=self.vocab_size
        )
        for path, matrix in self.matrices.items():
            matrix.weight = self.weights[path]
        bits = bits_per_weight(self.sizes, forms)
        print(_row(name, bits, found), flush=True)
        return {"bits_per_weight": bits, **asdict(found)}

    def _logits(self) -> list[mx.array]:
        logits = [self.model(window[None])[0] for window in self.windows]
        mx.eval(logits)
        return logits


def _as_they_are(logits: mx.array) -> mx.array:
    return logits


def _row(name: str, bits: float, found: Comparison) -> str:
    return (
        f"{name:24} {bits:6.3f} {found.kl_mean:9.5f} {found.kl_p999:9.4f} {found.top1_agreement:7.2%} "
        f"{found.perplexity:10.3f}"
    )


if __name__ == "__main__":
    main()
