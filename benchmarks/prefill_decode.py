"""Prefill and decode beside mlx-lm, on one random checkpoint of the 0.8B shape, alternating in one process.

    env -u OPENBLAS_CORETYPE python benchmarks/prefill_decode.py --prompts 512 2048 --repeats 3

Both read the same folder in float32 (`--bits 4`: quantized, float32 activations). Without Metal the matmuls of both go
through the BLAS named by `--blas` (blas.py); the JSON says for which processor its kernels are.

A decode step is the model and its evaluation, without sampling, on the same fixed tokens. Wall time, medians; the ratio
is the median of the pairwise ratios. The last line is one JSON object; logits that differ by more than 5e-4 are an
error instead.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from blas import preload

TOLERANCE = 5e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, nargs="+", default=[512, 2048], help="tokens")
    parser.add_argument("--decode", type=int, default=16, help="tokens decoded after each prompt")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--bits", type=int, help="quantize the matrices")
    parser.add_argument("--blas", default="libopenblas.so.0", help='BLAS to preload; "wheel" keeps the one MLX brings')
    args = parser.parse_args()
    blas = preload(args.blas)

    import mlx.core as mx
    from checkpoint import make
    from mlx_lm.utils import load_model as load_peer

    from qwen_mlx.load import load_model

    name = f"qwen_mlx-random-0.8B-{args.layers}-{args.bits or 16}"
    folder = make(Path(tempfile.gettempdir()) / name, layers=args.layers, bits=args.bits)
    ours = load_model(folder, dtype="float32")
    peer, _ = load_peer(folder)
    peer.set_dtype(mx.float32)
    mx.eval(ours.parameters(), peer.parameters())
    results = {"device": str(mx.default_device()), "mlx": mx.__version__, **blas, "layers": args.layers,
               "bits": args.bits or 32, "prompts": {}}  # fmt: skip
    for length in args.prompts:
        tokens = [(7919 * i) % ours.config.text.vocab_size for i in range(length)]
        runs = []
        for repeat in range(args.repeats):
            pair = [("ours", run_ours, ours), ("peer", run_peer, peer)]
            timed = {
                which: run(model, tokens, args.decode) for which, run, model in (pair if repeat % 2 else pair[::-1])
            }
            runs.append(timed)
            print(f"{length} tokens, run {repeat + 1} of {args.repeats}: "
                  + ", ".join(f"{w} {length / t[0]:.1f} prefill {args.decode / t[1]:.2f} decode"
                              for w, t in sorted(timed.items())), file=sys.stderr)  # fmt: skip
        results["prompts"][length] = summary(runs, length, args.decode)
    worst = max(found["largest_logit_difference"] for found in results["prompts"].values())
    if not worst <= TOLERANCE:
        raise SystemExit(f"no speed is reported: the two models' logits differ by {worst:.1e}, allowed is {TOLERANCE}")
    print(json.dumps(results))


def summary(runs: list[dict], length: int, count: int) -> dict[str, float]:
    """Median tokens a second of each, median ratio ours : mlx-lm, and the largest difference of a logit."""
    found: dict[str, float] = {}
    for i, (what, tokens) in enumerate((("prefill", length), ("decode", count))):
        for which in ("ours", "peer"):
            found[f"{what}_{which}"] = round(statistics.median(tokens / run[which][i] for run in runs), 2)
        found[f"{what}_ratio"] = round(statistics.median(run["peer"][i] / run["ours"][i] for run in runs), 2)
    found["largest_logit_difference"] = max(float(abs(run["ours"][2] - run["peer"][2]).max()) for run in runs)
    return found


def run_ours(model, tokens: list[int], count: int):
    """-> seconds of prefill, seconds of decode, logits of every step [count + 1, V]"""
    import mlx.core as mx

    from qwen_mlx.decoding.prefill import prefill

    cache = model.make_cache()
    start = time.perf_counter()
    logits = prefill(model, tokens, cache, step_size=512)
    mx.eval(logits)
    return timed_decode(lambda token: model(token, cache)[:, -1], logits, count, start)


def run_peer(model, tokens: list[int], count: int):
    """mlx-lm's own way: chunks of 2,048 without logits, then the last token alone (`generate_step`)."""
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(model)
    start = time.perf_counter()
    body, last = tokens[:-1], tokens[-1]
    for first in range(0, len(body), 2048):
        model(mx.array([body[first : first + 2048]]), cache=cache)
        mx.eval([c.state for c in cache])
        mx.clear_cache()
    logits = model(mx.array([[last]]), cache=cache)[:, -1]
    mx.eval(logits)
    return timed_decode(lambda token: model(token, cache=cache)[:, -1], logits, count, start)


def timed_decode(step, logits, count: int, start: float):
    """Feed fixed tokens, so that both see the same text."""
    import mlx.core as mx
    import numpy as np

    prefilled = time.perf_counter()
    rows = [logits]
    for i in range(count):
        rows.append(step(mx.array([[100 + i]])))
        mx.eval(rows[-1])
    done = time.perf_counter()
    return prefilled - start, done - prefilled, np.array(mx.concatenate(rows))


if __name__ == "__main__":
    main()
