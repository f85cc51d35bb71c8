"""From the start of the command to its first token: qwen_mlx beside mlx-lm, on the same demo folder, alternating.

    python benchmarks/startup.py --repeats 5

Wall time from starting the interpreter to the first byte of generated text on stdout, medians, and the median of the
pairwise ratios; import time of the package alone. The last line is one JSON object.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

from qwen_mlx.hub import resolve

PROMPT = "Once upon a time"


def first_token(command: list[str], banner: bytes) -> float:
    """Seconds until a byte follows `banner` on stdout."""
    start = time.perf_counter()
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment) as process:
        assert process.stdout is not None
        seen = b""
        while len(seen) <= len(banner):
            byte = process.stdout.read(1)
            if not byte:
                raise SystemExit(f"{' '.join(command)} wrote no text: {seen!r}")
            seen += byte
        taken = time.perf_counter() - start
        process.stdout.read()
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    options = ["--model", str(resolve("demo")), "--prompt", PROMPT, "--max-tokens", "8", "--temp", "0"]
    ours = [sys.executable, "-m", "qwen_mlx.generate", *options]
    peer = [sys.executable, "-m", "mlx_lm", "generate", *options]
    bare = [sys.executable, "-c", "import qwen_mlx; print('.')"]
    runs = []
    for repeat in range(args.repeats + 1):
        timed = (first_token(ours, b""), first_token(peer, b"==========\n"), first_token(bare, b""))
        print("warm-up" if not repeat else f"run {repeat}", *(f"{t:.2f} s" for t in timed), file=sys.stderr)
        runs += [timed] if repeat else []
    median = [statistics.median(run[i] for run in runs) for i in range(3)]
    ratio = statistics.median(run[1] / run[0] for run in runs)
    print(json.dumps({"first_token_s": round(median[0], 3), "mlx_lm_first_token_s": round(median[1], 3),
                      "times_faster": round(ratio, 2), "python_and_import_s": round(median[2], 3)}))  # fmt: skip


if __name__ == "__main__":
    main()
