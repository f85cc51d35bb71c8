"""Host time of a decoded token beside mlx-lm's: what Python and MLX take to hand one step to the device.

    python benchmarks/host_time.py --tokens 200

Both run a random model of 24 layers like the 0.8B's, but so narrow that there is hardly anything to compute. Two times
for each engine, alternating token by token: until the step is built, which is the host's part alone, and until its
logits are there. Ours is the compiled step that Metal gets; off Metal MLX compiles with g++, and the package's kernels
are many plain operations instead of one, in the graph that is built here. mlx-lm's is its model as `generate_step`
calls it. Medians, and the median of the pairwise ratios. The last line is one JSON object.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
from checkpoint import TEXT_CONFIG, make
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model as load_peer

from qwen_mlx.load import load_model
from qwen_mlx.model.step import CompiledStep

NARROW = dict(
    hidden_size=64, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=64,
    linear_num_key_heads=1, linear_num_value_heads=1, linear_key_head_dim=32, linear_value_head_dim=32, vocab_size=256,
    rope_parameters=dict(TEXT_CONFIG["rope_parameters"], mrope_section=[3, 3, 2]),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=200, help="measured for each engine")
    count = parser.parse_args().tokens
    folder = make(Path(tempfile.mkdtemp()), layers=24, **NARROW)
    engines = {"ours": ours(folder), "peer": peer(folder)}
    for step in engines.values():
        mx.eval(step())  # traces and compiles
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
    for i in range(count):
        for name in engines if i % 2 else reversed(engines):
            times[name].append(timed(engines[name]))
        if (i + 1) % 50 == 0:
            print(f"{i + 1} of {count} tokens", file=sys.stderr)
    result: dict[str, object] = {"device": str(mx.default_device()), "mlx": mx.__version__, "tokens": count}
    for place, what in enumerate(("built", "done")):
        mine, theirs = ([pair[place] for pair in times[name]] for name in engines)
        result[what] = {
            "ours_ms": round(1e3 * statistics.median(mine), 3),
            "peer_ms": round(1e3 * statistics.median(theirs), 3),
            "ratio": round(statistics.median(b / a for a, b in zip(mine, theirs)), 2),
        }
    print(json.dumps(result))


def ours(folder: Path) -> Callable[[], list[mx.array]]:
    model = load_model(folder, dtype="float32")
    mx.eval(model.parameters())
    cache, step = model.make_cache(), CompiledStep(model._forward, model.config.text.layer_types)
    mx.eval(model(mx.array([[1, 2, 3]]), cache))
    token = mx.array([[5]], mx.uint32)
    return lambda: [step(token, cache), *cache.arrays]


def peer(folder: Path) -> Callable[[], list[mx.array]]:
    model, _ = load_peer(folder)
    model.set_dtype(mx.float32)
    cache = make_prompt_cache(model)
    mx.eval(model(mx.array([[1, 2, 3]]), cache=cache))
    token = mx.array([[5]], mx.uint32)
    return lambda: [model(token, cache=cache), *(array for layer in cache for array in layer.state)]


def timed(step: Callable[[], list[mx.array]]) -> tuple[float, float]:
    """Seconds until the step is built, and until it is done."""
    start = time.perf_counter()
    outputs = step()
    built = time.perf_counter()
    mx.eval(outputs)
    return built - start, time.perf_counter() - start


if __name__ == "__main__":
    main()
