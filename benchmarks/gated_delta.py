"""Time the gated delta rule for one token, a short block and a prefill against the naive loop; the last line is JSON.

    python benchmarks/gated_delta.py --key-heads 16 --value-heads 32

Every round runs both in turn, so that a busy machine slows both; the ratio is the median over the rounds.
It times process CPU time on a CPU and wall time elsewhere, and stops when the two disagree.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import mlx.core as mx

from qwen_mlx.kernels.gated_delta import gated_delta_rule, naive_gated_delta_rule

LENGTHS = {"one_token": 1, "short": 8, "chunked": 512}


def inputs(T: int, Hk: int, Hv: int, D: int) -> list[mx.array]:
    mx.random.seed(T)
    q, k = (mx.random.normal((1, T, Hk, D)) for _ in range(2))
    q, k = (x / mx.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    v, state = mx.random.normal((1, T, Hv, D)), mx.random.normal((1, Hv, D, D)) * 0.3
    g, beta = -mx.random.uniform(0, 0.2, (1, T, Hv)), mx.random.uniform(0, 1, (1, T, Hv))
    arrays = [q * D**-0.5, k, v, g, beta, state]
    mx.eval(arrays)
    return arrays


def milliseconds(rule: Callable[..., tuple[mx.array, mx.array]], arrays: list[mx.array]) -> float:
    clock = time.process_time if mx.default_device() == mx.cpu else time.perf_counter
    start = clock()
    mx.eval(rule(*arrays))
    return 1e3 * (clock() - start)


def compare(T: int, Hk: int, Hv: int, D: int, rounds: int) -> dict[str, float]:
    arrays = inputs(T, Hk, Hv, D)
    for fast, naive in zip(gated_delta_rule(*arrays), naive_gated_delta_rule(*arrays)):
        error = (mx.abs(fast - naive).max() / mx.abs(naive).max()).item()
        if not error < 1e-5:
            raise SystemExit(f"T = {T}: the fast form differs from the naive one by {error:.1e}; no times reported.")
    rules = gated_delta_rule, naive_gated_delta_rule
    pairs = [[milliseconds(rule, arrays) for rule in rules] for _ in range(rounds)]
    fast_ms, naive_ms = (statistics.median(times) for times in zip(*pairs))
    ratio = statistics.median(naive / fast for fast, naive in pairs)
    return {"T": T, "ms_per_token": fast_ms / T, "naive_ms_per_token": naive_ms / T, "naive_over_fast": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--key-heads", type=int, default=16)
    parser.add_argument("--value-heads", type=int, default=16)
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    result: dict[str, object] = {"device": str(mx.default_device()), **vars(args)}
    for name, T in LENGTHS.items():
        row = compare(T, args.key_heads, args.value_heads, args.head_size, args.rounds)
        result[name] = {key: round(value, 4) for key, value in row.items()}
        print(f"{name:10s} {row['ms_per_token']:8.4f} ms a token, naive {row['naive_over_fast']:.1f} times as long")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
