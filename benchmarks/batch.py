"""Eight prompts at once, beside one after the other and beside mlx-lm's `batch_generate`, with the embedded model.

    env -u OPENBLAS_CORETYPE python benchmarks/batch.py

All three write texts of one length greedily, in one process and by turns; wall time with the prompts read, medians, and
ratios pair by pair. mlx-lm reads the same folder, in the same dtype. The JSON, on the last line, says how many texts of
our batch are those of a run alone: a batch adds sums in another order.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

BLAS: dict[str, Any] = {}
if __name__ == "__main__":  # before MLX is imported
    from blas import preload

    BLAS = preload()

import mlx.core as mx  # noqa: E402
import mlx_lm  # noqa: E402

from qwen_mlx import batch_generate, load, stream_generate  # noqa: E402

PROMPTS = (
    "Once upon a time", "One day a dog went to the river.", "The cat had a red ball", "Tom and Mia went to the park.",
    "There was a small boat on the river.", "Mia saw a bird", "It was a sunny day", "The old king had a",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=200, help="of each text")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    model, tokenizer = load("demo", dtype="float32")
    assert model.folder is not None
    peer, peer_tokenizer = mlx_lm.load(str(model.folder))[:2]
    peer.set_dtype(mx.float32)
    peer_tokenizer.eos_token_ids = ()  # nobody ends a text before the others
    endless = {"logit_bias": {token: -1e9 for token in model.config.eos_token_ids}}
    options = {"temperature": 0.0, "max_tokens": args.tokens, **endless}
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]

    def ours() -> list[list[int]]:
        return [answer.tokens for answer in batch_generate(model, tokenizer, prompts, **options)]

    def alone() -> list[list[int]]:
        plain = {**options, "speculate": "off"}
        return [[each.token for each in stream_generate(model, tokenizer, prompt, **plain)] for prompt in prompts]

    def theirs() -> None:
        made = mlx_lm.batch_generate(peer, peer_tokenizer, prompts, max_tokens=args.tokens).stats.generation_tokens
        assert made == args.tokens * len(prompts), f"mlx-lm made {made} tokens only"

    runs: dict[str, Callable[[], list[list[int]] | None]] = {"ours": ours, "alone": alone, "mlx_lm": theirs}
    said = {name: run() for name, run in runs.items()}  # the first of each makes buffers
    seconds: list[dict[str, float]] = []
    for repeat in range(args.repeats):
        seconds.append({})
        for name in list(runs)[:: -1 if repeat % 2 else 1]:
            start = time.perf_counter()
            runs[name]()
            seconds[-1][name] = time.perf_counter() - start
        print(", ".join(f"{name} {took:.2f} s" for name, took in sorted(seconds[-1].items())), file=sys.stderr)
    found = {name: round(statistics.median(each[name] for each in seconds), 3) for name in runs}
    ratios = {
        f"ours_to_{name}": round(statistics.median(each[name] / each["ours"] for each in seconds), 2)
        for name in ("alone", "mlx_lm")
    }
    same = sum(a == b for a, b in zip(said["ours"] or [], said["alone"] or []))
    print(json.dumps({"device": str(mx.default_device()), **BLAS, "tokens": args.tokens * len(PROMPTS),
                      "seconds": found, **ratios, "texts_as_alone": same}))  # fmt: skip


if __name__ == "__main__":
    main()
