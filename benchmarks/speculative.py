"""Speculative decoding with the model's own draft head, beside plain decoding.

    env -u OPENBLAS_CORETYPE python benchmarks/speculative.py

Replays: recorded and drawn traces of right drafts (`data/traces.json`) against predicted costs of a round
(`data/step_costs.json`), through the controller that chooses the draft length. Nothing is timed, and the speed-ups are
as good as the predictions. What is checked is the controller: on a text of 256 tokens or more it is never below 0.98 of
plain decoding, and never below 0.95 of the best draft length that one could have fixed, knowing the text. A broken
promise ends it with status 1.

Measured: the embedded model writes text like its training text, greedily, and random text that is dictated to it,
plainly and with drafts ("auto") in turn and in one process; the ratio is the median over the pairs of the seconds that
decoding took, the measuring of the costs included. `--replays-only` leaves this out. The last line is one JSON object.
"""

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

BLAS: dict[str, Any] = {}
if __name__ == "__main__":  # before MLX is imported
    from blas import preload

    BLAS = preload(threads=1)

import mlx.core as mx  # noqa: E402

from qwen_mlx import load  # noqa: E402
from qwen_mlx.decoding.autoregressive import decode  # noqa: E402
from qwen_mlx.decoding.draft_length import Costs, DraftLength  # noqa: E402
from qwen_mlx.decoding.drafting import drafting  # noqa: E402
from qwen_mlx.decoding.prefill import prefill  # noqa: E402
from qwen_mlx.decoding.sampling import Sampler, SamplingParams  # noqa: E402
from qwen_mlx.decoding.speculative import decode_with_drafts  # noqa: E402
from qwen_mlx.model.qwen import Qwen  # noqa: E402

DATA = Path(__file__).parent / "data"
OF_PLAIN, OF_BEST, WHOLE_TEXT = 0.98, 0.95, 256


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replays-only", action="store_true", help="measure nothing")
    parser.add_argument("--rounds", type=int, default=5, help="pairs of each prompt")
    args = parser.parse_args(arguments)
    report = {"replays": replays()}
    if not args.replays_only:
        report["measured"] = measured(args.rounds)
    print(json.dumps(report))
    sys.exit(1 if report["replays"]["broken"] else 0)


def replays() -> dict[str, Any]:
    """Every trace with every row of costs: a table, and what its worst lines are."""
    costs, traces = (json.loads((DATA / f"{name}.json").read_text()) for name in ("step_costs", "traces"))
    print(f"{'costs (predictions)':<30} {'trace':<18} {'best fixed k':>12} {'its':>6} {'ours':>6} {'ours/best':>9}")
    lines = [line(row, trace) for row in costs["rows"] for trace in traces["traces"]]
    broken = sum(ours < OF_PLAIN or ours / best < OF_BEST for best, ours in lines)
    return {
        "lines": len(lines),
        "worst_of_plain": round(min(ours for _, ours in lines), 4),
        "worst_of_best": round(min(ours / best for best, ours in lines), 4),
        "broken": broken,
    }


def line(row: dict[str, Any], trace: dict[str, Any]) -> tuple[float, float]:
    """Print one line; the speeds of the best fixed k and of ours, plain decoding being 1."""
    rounds, right = row["rounds_ms"], [int(digit) for digit in trace["right"]]
    if len(right) < WHOLE_TEXT:
        raise SystemExit(f"{trace['name']} has {len(right)} tokens: nothing is promised below {WHOLE_TEXT}.")
    best, k = max((speed(rounds, right, lambda k=k: k), k) for k in range(len(rounds)))
    length = DraftLength(Costs(tuple(rounds)), start=row["start"])
    ours = speed(rounds, right, length.choose, length.observe)
    where = f"{row['chip']}, {row['model']}, {row['view']}"
    print(f"{where:<30} {trace['name']:<18} {k:>12} {best:>6.3f} {ours:>6.3f} {ours / best:>9.3f}")
    return best, ours


def speed(
    rounds: list[float],
    right: list[int],
    choose: Callable[[], int],
    observe: Callable[[int, int], None] = lambda k, accepted: None,
) -> float:
    """Decode the text of a trace in rounds; how much faster than plain decoding that is."""
    t, spent = 0, 0.0
    while t < len(right):
        k = min(choose(), len(right) - 1 - t)  # a draft beyond the end would be of no use
        accepted = min(k, right[t])
        observe(k, accepted)
        spent += rounds[k]
        t += accepted + 1
    return len(right) * rounds[0] / spent


class Dictated(Sampler):
    """Draws the tokens of a given text, whatever the logits say; drafts are drawn as ever."""

    def __init__(self, text: list[int], **sizes: int) -> None:
        super().__init__(SamplingParams(), [], **sizes)
        self.text, self.place, self._sizes = mx.array(text, mx.uint32), 0, sizes

    def __call__(self, logits: mx.array) -> mx.array:
        self.place += 1
        return self.text[self.place - 1 : self.place] + 0 * mx.argmax(logits, axis=-1)  # else nothing would be computed

    def along(self, tokens: mx.array) -> Sampler:
        places = Dictated([], **self._sizes)
        places.text = self.text[self.place : self.place + tokens.size + 1]
        return places

    def greedy(self, logits: mx.array) -> mx.array:
        return self.text + 0 * mx.argmax(logits, axis=-1)

    def observe(self, tokens: mx.array) -> None:
        self.place += 1

    def __copy__(self) -> Sampler:
        return Sampler(SamplingParams(), [], **self._sizes)


PROMPTS = ("Tell me a story about a fox.", "Tell me a story.", "Once upon a time", "A story about Mary, please.")
TOKENS = 400


def measured(rounds: int) -> dict[str, Any]:
    """Plain decoding and "auto", pair by pair: median ratio of seconds, and how many tokens were drafts that stood."""
    model, tokenizer = load("demo")
    sizes = {"vocab_size": model.config.text.vocab_size, "num_real_tokens": tokenizer.vocab_size}
    endless = SamplingParams(logit_bias={token: -1e4 for token in model.config.eos_token_ids})
    draw = random.Random(1)
    noise = [[draw.randrange(300, tokenizer.vocab_size) for _ in range(TOKENS)] for _ in PROMPTS]
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    texts: dict[str, list[Callable[[], Sampler]]] = {
        "text like its training text": [lambda: Sampler(endless, [], **sizes)] * len(prompts),
        "random text": [lambda text=text: Dictated(text, **sizes) for text in noise],  # type: ignore[misc]
    }
    decoded(model, prompts[0], Sampler(endless, [], **sizes), "off")  # the first of all makes buffers
    found: dict[str, Any] = {"device": str(mx.default_device()), **BLAS}
    for name, samplers in texts.items():
        ratios, drafts = [], []
        for pair in range(rounds):
            for prompt, sampler in zip(prompts, samplers):
                order = ("off", "auto") if pair % 2 else ("auto", "off")
                runs = {mode: decoded(model, prompt, sampler(), mode) for mode in order}
                ratios.append(runs["off"][0] / runs["auto"][0])
                drafts.append(runs["auto"][1] / TOKENS)
        found[name] = {"ratio": round(statistics.median(ratios), 3), "drafts": round(statistics.mean(drafts), 3)}
        print(f"measured, {name}: {found[name]['ratio']} times plain decoding, {found[name]['drafts']:.0%} drafts")
    return found


def decoded(model: Qwen, prompt: list[int], sampler: Sampler, mode: str) -> tuple[float, int]:
    """Seconds of decoding, and drafts that stood."""
    drafts, cache = drafting(model, prompt, SamplingParams(), mode), model.make_cache()
    logits = prefill(model, prompt, cache, step_size=512, seen=drafts.seen if drafts else None)
    mx.eval(logits)
    start = time.perf_counter()
    if drafts is None:
        stood = sum(draft for _, _, draft in decode(model, logits, cache, sampler, count=TOKENS))
    else:
        tokens = decode_with_drafts(model, logits, cache, sampler, count=TOKENS, drafting=drafts)
        stood = sum(draft for _, _, draft in tokens)
    return time.perf_counter() - start, stood


if __name__ == "__main__":
    main()
