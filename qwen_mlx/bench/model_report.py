"""What the model bench found, as a table for people and as an object for programs. Measures nothing."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from qwen_mlx.bench.chips import Chip
from qwen_mlx.bench.model_agreement import NearTie
from qwen_mlx.bench.model_bytes import StepBytes
from qwen_mlx.bench.model_engines import Run
from qwen_mlx.bench.model_figures import Figure, figure, figures, ratio, ratios
from qwen_mlx.bench.model_startup import Starts
from qwen_mlx.bench.table import aligned

LEGEND = """\
Medians; in brackets the spread, (largest - smallest) / median. first token: from the prompt to its first new token, the
drawing included. prefill: prompt tokens over that time, as mlx-lm counts it. decode: the tokens after the first over
the time between the first and the last. peak memory: MLX's arrays, weights included, as if the engine were alone.
bandwidth: the bytes that a decode step must read and write, over its time, as a share of the published bandwidth."""
RATIO_LEGEND = """\
ratio: how many times better qwen_mlx is than mlx-lm, above 1 where it is ahead, of every repetition's pair; the two
alternate. Start-up is each engine's own command with its own defaults; mlx-lm's runs in the checkpoint's dtype."""
COLUMNS: dict[str, tuple[str, float]] = {  # heading, and what the value is multiplied by
    "prefill_tok_s": ("prefill tok/s", 1),
    "decode_tok_s": ("decode tok/s", 1),
    "first_token_s": ("first token ms", 1e3),
    "peak_bytes": ("peak MiB", 2**-20),
}


@dataclass(frozen=True)
class Result:
    """After one prompt: the runs of each engine in pairs, and where their greedy tokens nearly tie."""

    prompt_tokens: int
    prompt_sha256: str
    step: StepBytes
    runs: dict[str, list[Run]]
    ties: list[NearTie] = field(default_factory=list)

    @property
    def figures(self) -> dict[str, dict[str, Figure]]:
        return {engine: figures(runs) for engine, runs in self.runs.items()}

    @property
    def ratios(self) -> dict[str, Figure]:
        """Empty if there is one engine only."""
        first, *others = self.figures.values()
        return ratios(first, others[0]) if others else {}


@dataclass(frozen=True)
class Report:
    """`about`: model, device, versions and the like. `no_share`: why there is no share of the bandwidth."""

    about: dict[str, Any]
    starts: dict[str, Starts]
    results: list[Result]
    chip: Chip | None
    no_share: str

    def share(self, result: Result, engine: str) -> float | None:
        rate = result.figures[engine]["decode_tok_s"].median
        return None if self.chip is None else result.step.share(self.chip, rate)


def lines(report: Report, shown: Callable[[int], str]) -> list[str]:
    """The readable part: header, table, start-up, near ties, legend."""
    about = report.about
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    hashes = ", ".join(f"{r.prompt_tokens} tokens {r.prompt_sha256}" for r in report.results)
    head = [
        f"{about['model']} on {about['device']}, {about['dtype']}, quantization {about['quantization']}; "
        f"{about['generated_tokens']} tokens generated, {about['repetitions']} repetitions",
        f"{versions}; {about['platform']}" + (f"; preloaded {about['preloaded']}" if about["preloaded"] else ""),
        f"prompts (sha256): {hashes}",
    ]
    no_share = f"No share of the bandwidth: {report.no_share}." if report.no_share else ""
    legend = LEGEND + ("\n" + RATIO_LEGEND if len(report.starts) > 1 else "")
    tail = [*_bytes(report), *_start_lines(report.starts), *_tie_lines(report, shown), no_share]
    return [*head, "", *_table(report), "", *filter(None, tail), "", legend]


def _table(report: Report) -> list[str]:
    rows = [["prompt", "engine", *(heading for heading, _ in COLUMNS.values()), "bandwidth"]]
    for result in report.results:
        for engine, measured in result.figures.items():
            cells = [_cell(measured[name], factor) for name, (_, factor) in COLUMNS.items()]
            share = report.share(result, engine)
            rows.append([str(result.prompt_tokens), engine, *cells, "-" if share is None else f"{share:.0%}"])
        if result.ratios:
            cells = [_cell(result.ratios[name], 1) for name in COLUMNS]
            rows.append([str(result.prompt_tokens), "ratio", *cells, ""])
    return aligned(rows, left=1)


def _cell(measured: Figure, factor: float) -> str:
    return f"{_number(measured.median * factor)} ({measured.spread:.0%})"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def _bytes(report: Report) -> list[str]:
    def said(step: StepBytes) -> str:
        parts = ((step.weights, "weights"), (step.kv, "keys and values"), (step.states, "states"))
        return ", ".join(f"{count / 2**20:.2f} MiB {what}" for count, what in parts)

    return [f"A decode step after {r.prompt_tokens} tokens must move {said(r.step)}." for r in report.results]


def _start_lines(starts: dict[str, Starts]) -> list[str]:
    told = [
        f"{name} {_cell(figure(one.seconds), 1)}" if one.seconds else f"{name} not timed: {one.reason}"
        for name, one in starts.items()
    ]
    compared = _start_ratio(starts)
    return [
        "Start-up, from the command to its first token, in s: "
        + "; ".join([*told, *([f"ratio {_cell(compared, 1)}"] if compared else [])])
    ]


def _start_ratio(starts: dict[str, Starts]) -> Figure | None:
    seconds = [one.seconds for one in starts.values()]
    return ratio(*seconds, more_is_better=False) if len(seconds) == 2 and all(seconds) else None


def _tie_lines(report: Report, shown: Callable[[int], str]) -> list[str]:
    if len(report.starts) == 1:
        return []
    found = [
        f"Near tie after {result.prompt_tokens} tokens, at token {tie.position}: {shown(tie.ours)} or "
        f"{shown(tie.theirs)}, "
        f"{tie.our_gap:.2g} and {tie.their_gap:.2g} apart; at most {tie.bound:.2g} is near."
        for result in report.results
        for tie in result.ties
    ]
    return found or ["The greedy tokens of both engines are the same."]


def as_object(report: Report) -> dict[str, Any]:
    """Everything, for the last line; times in seconds, rates in tokens a second."""
    compared = _start_ratio(report.starts)
    return {
        "bench": "model",
        **report.about,
        "bandwidth_gb_s": report.chip.bandwidth if report.chip else None,
        "no_share_of_bandwidth": report.no_share or None,
        "startup_s": {
            name: _figure(figure(one.seconds)) if one.seconds else None for name, one in report.starts.items()
        },
        "startup_missing": {name: one.reason for name, one in report.starts.items() if one.reason},
        "startup_ratio": _figure(compared) if compared else None,
        "results": [_result(report, result) for result in report.results],
    }


def _result(report: Report, result: Result) -> dict[str, Any]:
    engines = {
        engine: {
            **{name: _figure(one) for name, one in measured.items()},
            "share_of_bandwidth": _rounded(report.share(result, engine)),
        }
        for engine, measured in result.figures.items()
    }
    return {
        "prompt_tokens": result.prompt_tokens,
        "prompt_sha256": result.prompt_sha256,
        "bytes_per_step": {**asdict(result.step), "total": result.step.total},
        "engines": engines,
        "ratios": {name: _figure(one) for name, one in result.ratios.items()},
        "near_ties": [asdict(tie) for tie in result.ties],
    }


def _figure(one: Figure) -> dict[str, Any]:
    return {"median": _rounded(one.median), "spread": _rounded(one.spread), "values": _all_rounded(one.values)}


def _all_rounded(values: Sequence[float]) -> list[float | None]:
    return [_rounded(value) for value in values]


def _rounded(value: float | None) -> float | None:
    """To nine digits; integers as they are."""
    return value if value is None or isinstance(value, int) else float(f"{value:.9g}")
