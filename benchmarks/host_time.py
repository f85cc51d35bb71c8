"""The host's time for a decoded token beside mlx-lm's: what it takes to build one step for the device.

    python benchmarks/host_time.py --rounds 9

Both build the step of the 0.8B, 4 bit, 24 layers, with its greedy sampling, as they would on Metal: what is one launch
there is one node of the graph, made by the cheapest call there is, and nobody computes its contents
(`qwen_mlx.bench.launch_count`). So it runs on any machine, and host time is all there is. Ours is the compiled graph
that decoding runs, mlx-lm's is built in Python anew for every token. An engine builds 60 steps and then the other does,
as each would by itself; freeing a graph is not timed. Medians of the last 50 of a round, and the median of the rounds'
ratios. The last line is one JSON object.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import mlx.core as mx
from checkpoint import make

from qwen_mlx.bench.launch_count import hollow_cache, hollow_out, hollow_out_ours, stand_ins, token
from qwen_mlx.bench.launch_peer import hollow_peer_cache, peer_stand_in, sampled_by_peer
from qwen_mlx.bench.model_peer import load_peer
from qwen_mlx.load import load_model
from qwen_mlx.model.projection import fuse_projections
from qwen_mlx.model.step import CompiledStep

STEPS, WARM = 60, 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    folder = make(Path(tempfile.gettempdir()) / "qwen_mlx-random-0.8B-24-4", bits=4)
    engines = {"ours": ours(folder), "peer": peer(folder)}
    with stand_ins(), peer_stand_in():
        times = [[milliseconds(*engine) for engine in engines.values()] for _ in range(rounds)]
    mine, theirs = (statistics.median(column) for column in zip(*times))
    ratio = statistics.median(b / a for a, b in times)
    print(json.dumps({"ours_ms": round(mine, 3), "peer_ms": round(theirs, 3), "ratio": round(ratio, 2)}))


def ours(folder: Path) -> tuple[Callable[[], object], Callable[[], None]]:
    """What builds a step, and what brings the cache back to where it was."""
    model = load_model(folder, dtype="bfloat16")
    fuse_projections(model)
    hollow_out_ours(model)
    state = hollow_cache(model, range(24))
    step, start, one = CompiledStep(model._forward, model.config.text.layer_types), state.snapshot(), token()
    return lambda: mx.argmax(step(one, state)[0][:, -1], axis=-1), partial(state.restore, start)


def peer(folder: Path) -> tuple[Callable[[], object], Callable[[], None]]:
    model = load_peer(folder)
    hollow_out(model)
    text, state, one = load_model(folder, dtype="bfloat16").config.text, model.make_cache(), token()
    return lambda: sampled_by_peer(model, one, state), partial(hollow_peer_cache, state, text, mx.bfloat16)


def milliseconds(step: Callable[[], object], reset: Callable[[], None]) -> float:
    times = []
    for _ in range(STEPS):
        reset()
        start = time.perf_counter()
        built = step()
        times.append(time.perf_counter() - start)
        reset()
        del built
    return 1e3 * statistics.median(times[WARM:])


if __name__ == "__main__":
    main()
