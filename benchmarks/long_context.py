"""Peak memory of long prompts on a tiny model: what a token adds, and that it adds the same at any length.

    python benchmarks/long_context.py [--lengths 32768 65536 131072 262144] [--step-size 128] [--kv-bits 8]

Random weights; Hq/Hkv 1/1, Dh 32, one full-attention layer of two. On a CPU a chunk writes out its scores with all keys
in sight, so the slope there is that of keys and values and of a chunk's scores: both linear. The bytes counted beside
the peak are those of the memory preflight. LD_PRELOAD=libopenblas.so.0 makes it faster. The last line is JSON.
"""

import argparse
import json
import time
from pathlib import Path

import mlx.core as mx
import numpy as np

from qwen_mlx.config import parse_config
from qwen_mlx.decoding.memory import device_limits
from qwen_mlx.decoding.prefill import prefill
from qwen_mlx.decoding.preflight import check_memory
from qwen_mlx.model.qwen import Qwen

CONFIG = {
    "model_type": "qwen3_5_text", "hidden_size": 32, "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"], "num_attention_heads": 1, "num_key_value_heads": 1,
    "head_dim": 32, "linear_num_key_heads": 1, "linear_num_value_heads": 1, "linear_key_head_dim": 32,
    "linear_value_head_dim": 32, "linear_conv_kernel_dim": 4, "vocab_size": 256, "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "intermediate_size": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25,
                        "mrope_section": [2, 1, 1]},
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768, 65536, 131072, 262144])
    parser.add_argument("--step-size", type=int, default=128, help="tokens of a chunk")
    parser.add_argument("--kv-bits", type=int, choices=(4, 8))
    args = parser.parse_args()
    model = Qwen(parse_config(CONFIG, {}, Path("long_context")))
    mx.eval(model.parameters())
    runs = [measure(model, length, args.step_size, args.kv_bits) for length in args.lengths]
    lengths, peaks = np.array(args.lengths, float), np.array([run["peak_bytes"] for run in runs], float)
    slope, start = np.polyfit(lengths, peaks, 1)
    worst = float(np.abs(slope * lengths + start - peaks).max() / peaks.max())
    print(f"{slope:,.0f} bytes a token; off a straight line by at most {worst:.1%} of the largest peak")
    result = {"step_size": args.step_size, "kv_bits": args.kv_bits, "device": str(mx.default_device()), "runs": runs}
    print(json.dumps(result | {"bytes_per_token": round(slope), "off_the_line": round(worst, 4)}))


def measure(model: Qwen, length: int, step_size: int, kv_bits: int | None) -> dict[str, float | int]:
    """One prompt of random tokens: its peak, and the bytes that the preflight counts."""
    tokens = np.random.default_rng(0).integers(0, 256, length).tolist()
    plan = check_memory(model, length, 1, step_size=step_size, kv_bits=kv_bits)
    mx.clear_cache()
    mx.reset_peak_memory()
    start = time.perf_counter()
    with device_limits():
        cache = model.make_cache(kv_bits=kv_bits)
        mx.eval(prefill(model, tokens, cache, step_size=step_size))
    run = {
        "tokens": length,
        "peak_bytes": mx.get_peak_memory(),
        "counted_bytes": plan.total,
        "cache_bytes": cache.nbytes,
    }
    print(f"{length:9,} tokens  peak {run['peak_bytes'] / 1e6:8.1f} MB  counted {plan.total / 1e6:8.1f} MB  "
          f"{time.perf_counter() - start:6.0f} s", flush=True)  # fmt: skip
    return run


if __name__ == "__main__":
    main()
