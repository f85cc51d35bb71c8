"""Converting beside mlx-lm: one random checkpoint of the 0.8B shape to 4 bits, each run in a process of its own.

    python benchmarks/conversion.py --repeats 5

Both read the same bfloat16 file and write flat 4 bit in groups of 64. Neither compares the result with its source, and
ours writes the exact gains besides. Wall time of the conversion without imports, and the process's peak of resident
memory. The engines alternate; medians, and the median of the pairwise ratios. The last line is one JSON object.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from checkpoint import make

OURS = """
from pathlib import Path
from qwen_mlx.convert.pipeline import Options, convert
from qwen_mlx.convert.recipes import Form
def run(source, target): convert(Options(source, Path(target), form=Form(4, 64), verify=False))
"""
PEER = """
from mlx_lm.convert import convert
def run(source, target): convert(source, target, quantize=True, q_bits=4, q_group_size=64)
"""
TIMED = """
import json, resource, sys, time
start = time.perf_counter()
run(*sys.argv[1:])
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
print(json.dumps({"seconds": seconds, "peak_mb": peak / 1e6}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    source = make(Path(tempfile.gettempdir()) / "qwen_mlx-random-0.8B-24-16")
    runs = []
    for repeat in range(repeats):
        order = [("ours", OURS), ("peer", PEER)][:: -1 if repeat % 2 else 1]
        runs.append({name: measured(program, source) for name, program in order})
        print(f"run {repeat + 1} of {repeats}: {json.dumps(runs[-1])}", file=sys.stderr)
    found = {}
    for what in ("seconds", "peak_mb"):
        for name in ("ours", "peer"):
            found[f"{what}_{name}"] = round(statistics.median(run[name][what] for run in runs), 2)
        found[f"{what}_ratio"] = round(statistics.median(run["ours"][what] / run["peer"][what] for run in runs), 3)
    print(json.dumps(found))


def measured(program: str, source: Path) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", program + TIMED, str(source), str(Path(folder) / "model")]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        size = sum(file.stat().st_size for file in (Path(folder) / "model").glob("*.safetensors"))
    if size < 4e8:
        raise SystemExit(f"{program.splitlines()[1]} wrote {size} bytes, which is no 4 bit model of this shape.")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
