"""The files of the model bench: raw figures as CSV, speeds over context length as PNG; written beside, then renamed."""

import csv
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_mlx.bench.model_report import Report, Result
from qwen_mlx.errors import QwenMLXError

COLUMNS = (
    "engine",
    "prompt_tokens",
    "generated_tokens",
    "repetition",
    "prefill_tok_s",
    "decode_tok_s",
    "first_token_s",
    "decode_s",
    "peak_bytes",
    "startup_s",
)


class NoMatplotlib(QwenMLXError):
    """A plot was asked for and nothing here can draw it."""


def require_matplotlib() -> Any:
    """The class of its figures, which draws without a screen. Raises NoMatplotlib."""
    if not TYPE_CHECKING:  # an optional extra, whose types may be missing
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise NoMatplotlib(
                '--plot draws with matplotlib, which is not here: pip install "qwen-mlx[plot]"'
            ) from None

        return Figure


def write_csv(path: Path, report: Report) -> None:
    """A row for every engine, prompt and repetition; the start-up of a repetition stands in the rows of each prompt."""

    def write(partial: Path) -> None:
        with partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            writer.writerows(row for result in report.results for row in _rows(report, result))

    _beside(path, write)


def _rows(report: Report, result: Result) -> list[list[Any]]:
    return [
        [
            engine,
            run.prompt_tokens,
            run.generated_tokens,
            repetition + 1,
            run.prefill_tps,
            run.decode_tps,
            run.first_s,
            run.decode_s,
            run.peak_bytes,
            (report.starts[engine].seconds or {repetition: ""})[repetition],
        ]
        for engine, runs in result.runs.items()
        for repetition, run in enumerate(runs)
    ]


def write_plot(path: Path, report: Report) -> None:
    """Prefill and decode over the length of the prompt: medians, with bars from the slowest to the fastest run."""
    about = report.about
    drawing = require_matplotlib()(figsize=(10, 4.5), layout="constrained")
    drawing.suptitle(f"{about['model']} on {about['device']}, {about['dtype']}, quantization {about['quantization']}")
    panels = drawing.subplots(1, 2)
    results = sorted(report.results, key=lambda result: result.prompt_tokens)
    lengths = [result.prompt_tokens for result in results]
    for axes, name in zip(panels, ("prefill_tok_s", "decode_tok_s")):
        for engine in results[0].runs:
            measured = [result.figures[engine][name] for result in results]
            medians = [one.median for one in measured]
            below = [one.median - min(one.values) for one in measured]
            above = [max(one.values) - one.median for one in measured]
            axes.errorbar(lengths, medians, yerr=[below, above], marker="o", capsize=3, label=engine)
        axes.set_title(name.removesuffix("_tok_s"))
        axes.set_xlabel("context length in tokens")
        axes.set_ylabel("tok/s")
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [str(length) for length in lengths])
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
    _beside(path, lambda partial: drawing.savefig(partial, format="png", dpi=150))


def _beside(path: Path, write: Callable[[Path], object]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
