"""Published speeds of plain decoding to `step_costs.json`: what a round with k drafts is predicted to cost.

    python benchmarks/data/costs.py

Nobody has published such costs for these sizes. What was published are plain speeds, and pairs of speeds with and
without drafts. A formula takes the round's cost from such a pair, in plain steps of the model it was measured with, and
changes the part of the drafts to the size in question. Where two sources contradict each other, each makes a row.
"""

import json
from pathlib import Path

MLXCEL = "https://github.com/lablup/mlxcel/blob/main/docs/"
RAPID = "https://github.com/raullenchai/Rapid-MLX/"
SWIFT = "https://github.com/ekryski/mlx-swift-lm (benchmark reports; 2B with quantized keys, 2B-9B with perplexity on)"

SOURCES = {
    "M1 Max": SWIFT,
    "M1 Ultra": MLXCEL + "benchmark_results/model_tests_m1ultra.md",
    "M2 Pro": RAPID + "blob/main/docs/engineering/performance/2026-08-21-mac-mini-model-matrix.md",
    "M3 Ultra": RAPID + "tree/main/reports/benchmarks (qwen35-4b-mlxlm.json, upstream-qwen35-9b.json)",
    "M5 Max": MLXCEL + "benchmark_results/model_tests_m5max.md",
}
PLAIN = {  # tok/s of mlx-lm or mlx-swift, 4 bit, short context; sizes that nobody published are left out
    "M1 Max": {"0.8B": 202.0, "2B": 92.5, "4B": 66.4, "9B": 46.8},
    "M1 Ultra": {"0.8B": 269.5, "2B": 211.7, "4B": 115.6, "9B": 81.3},
    "M2 Pro": {"4B": 64.0, "9B": 37.4},
    "M3 Ultra": {"4B": 168.8, "9B": 107.2},
    "M5 Max": {"0.8B": 545.0, "2B": 346.0, "4B": 174.5, "9B": 108.3},
}
# The share of the output matrix in a step's bytes (248,320 rows at 4.5 bits against the weights), and the layers.
HEAD = {"0.8B": (0.35, 24), "2B": (0.28, 24), "4B": (0.16, 32), "9B": (0.12, 32), "27B": (0.05, 64)}

FORMULAS = {
    "narrow": {
        "view": "pessimistic",
        "measured_with": "27B",
        "rounds": [1.0, 2.0, 2.77, 3.54, 4.32],
        "formula": "1.231 + 0.771 k, k > 0: the published fit 0.46 + 0.771 K of a round that verifies K = k + 1 tokens",
        "source": MLXCEL + "benchmarks.md (Qwen 3.8 27B with its 4 bit MTP head, M1 Ultra)",
        "assumes": "before M3 every verified row costs a pass of its own, at any size",
    },
    "m2_pro_4b": {
        "view": "optimistic",
        "measured_with": "4B",
        "rounds": [1.0, 1.58, 2.16, 2.74, 3.32],
        "formula": "1 + 0.58 k: (1 + 2 * 74/159) tokens a round * 61.5 / 55 tok/s = 2.16 plain steps at k = 2",
        "source": RAPID + "pull/3144 (M2 Pro, 60-63 tok/s plain, 55 with k = 2 at temperature 0); acceptance of "
        + RAPID + "issues/3115",
        "assumes": "drafts on M2 Pro as good as those counted on M3 Ultra; k = 1 there was slower than this (45 tok/s)",
    },
    "rapid_4b": {
        "view": "pessimistic",
        "measured_with": "4B",
        "rounds": [1.0, 1.9, 2.8, 3.7, 4.6],
        "formula": "1 + 0.9 k: (1 + 2 * 44/100) * 164 / 110 tok/s = 2.80 plain steps at k = 2",
        "source": RAPID + "issues/3115 (M3 Ultra, 164 tok/s plain, 110 with k = 2)",
        "assumes": "'attempts' counts drafted tokens; that engine restores a snapshot and runs accepted tokens again",
    },
    "rapid_9b": {
        "view": "pessimistic",
        "measured_with": "9B",
        "rounds": [1.0, 1.8, 2.6, 3.4, 4.2],
        "formula": "1 + 0.8 k: (1 + 3 * 1111/1304) * 115.6 / 120.7 tok/s = 3.41 plain steps at k = 3",
        "source": RAPID + "issues/2175 (M3 Ultra, 115.6 tok/s plain, 120.7 with k = 3)",
        "assumes": "every round had 3 drafts; if each had 1, as suspected there, 1.852 * 115.6 / 120.7 = 1.77 at k = 1",
    },
    "m3_ultra": {
        "view": "optimistic",
        "measured_with": "27B",
        "rounds": [1.0, 1.22, 1.50, 1.90, 2.33],
        "formula": "tokens a round * 35.7 / tok/s: 1.869/54.6, 2.492/59.5, 3.051/57.4, 3.398/52.1",
        "source": MLXCEL + "benchmarks.md (Qwen 3.8 27B with its 4 bit MTP head, M3 Ultra, widths 2-5)",
        "assumes": "a verified row costs the same share of a step at any size",
    },
    "mtplx_4b": {
        "view": "pessimistic",
        "measured_with": "4B",
        "rounds": [1.0, 1.44, 1.88, 2.32, 2.76],
        "formula": "1 + 0.44 k: 3.04 tokens a round / 227.8 tok/s at k = 3, in plain steps of 1 / 174.5 s = 2.33",
        "source": "https://github.com/youssofal/MTPLX (Qwen3.5-4B, M5 Max: 227.8 tok/s at depth 3)",
        "assumes": "drafts right with 0.85, 0.80, 0.75, a guess; mlx-lm's plain step, not its own (133.6 tok/s)",
    },
    "m5_max": {
        "view": "optimistic",
        "measured_with": "27B",
        "rounds": [1.0, 1.16, 1.32, 1.55, 1.94],
        "formula": "ms for T = k + 1 tokens / 30.7 + 0.09 k: 35.2 for 3, 39.4 for 4, 75.7 for 8, linear between",
        "source": "https://github.com/lablup/mlxcel/pull/1182 and " + MLXCEL
        + "benchmark_results/mtp-drafter-step-profile-m5max-2026-08-17.md",
        "assumes": "a draft step is a quarter of the 10.67 ms that one with a bfloat16 head took; no other bookkeeping",
    },
}  # fmt: skip
USED = {  # the formulas of each chip, or of a size on it
    "M1 Max": ["narrow", "m2_pro_4b"],
    "M1 Ultra": ["narrow", "m2_pro_4b"],
    "M2 Pro": ["narrow", "m2_pro_4b"],
    "M3 Ultra 4B": ["rapid_4b", "m3_ultra"],
    "M3 Ultra 9B": ["rapid_9b", "m3_ultra"],
    "M5 Max": ["mtplx_4b", "m5_max"],
}


def draft_step(size: str) -> float:
    """One step of the draft head in plain steps: the output matrix, a layer, and half a layer for its first matrix."""
    head, layers = HEAD[size]
    return head + 1.5 * (1 - head) / layers


def table() -> dict[str, object]:
    rows = []
    for chip, speeds in PLAIN.items():
        for size, speed in speeds.items():
            for name in USED.get(f"{chip} {size}", USED.get(chip, [])):
                formula = FORMULAS[name]
                more = draft_step(size) - draft_step(str(formula["measured_with"]))
                steps = [cost + k * more for k, cost in enumerate(formula["rounds"])]
                start = 0 if chip < "M3" else None
                rows.append({
                    "chip": chip, "model": size, "view": formula["view"], "plain_tok_s": speed, "prediction": name,
                     "start": start, "rounds_ms": [round(1e3 * cost / speed, 3) for cost in steps],
                })  # fmt: skip
    about = (
        "Plain speeds are published measurements; every cost of a round with drafts is a prediction, and none of them "
        "was measured by this project. rounds_ms[k] = 1000 / plain_tok_s * (rounds[k] of the prediction + "
        "k * (d(model) - d(measured_with))), d = share of the output matrix + 1.5 * the rest / layers, a draft step."
    )
    shares = {size: round(draft_step(size), 3) for size in HEAD}
    return {"about": about, "plain_sources": SOURCES, "draft_step": shares, "predictions": FORMULAS, "rows": rows}


if __name__ == "__main__":
    Path(__file__).with_name("step_costs.json").write_text(json.dumps(table(), indent=1) + "\n")
