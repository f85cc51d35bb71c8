"""Plant one small mistake after another into the Metal kernels and see whether each is noticed.

    python -m tests.metal_emulator.mutate [--kernel gated_delta_scan]

A mutant is a kernel's text with one token changed. It is noticed by the compiler, by a check of the emulator, or by a
value that is too far from float64. Mutants that nothing notices must stand in survivors.py with the reason; the command
fails on one that does not, and on a reason whose mutant is noticed or gone.
"""

import argparse
import multiprocessing
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from qwen_mlx.kernels import backend
from qwen_mlx.kernels.add_rms_norm import add_rms_norm
from qwen_mlx.kernels.causal_conv1d import causal_conv1d
from qwen_mlx.kernels.gated_delta_chunk import metal_gated_delta_chunk
from qwen_mlx.kernels.gated_delta_replay import gated_delta_replay
from qwen_mlx.kernels.gated_delta_scan import Tape, gated_delta_scan, recurrent_gated_delta_scan
from qwen_mlx.kernels.gated_delta_step import gated_delta_step
from qwen_mlx.kernels.qk_norm_rope import qk_norm_rope
from qwen_mlx.kernels.random_inputs import AttentionSizes, random_heads, random_sum
from qwen_mlx.metal import source
from tests import reference
from tests.kernels.problems import adversarial_problem, as_one_matmul_gives_them, conv_problem, problem, step_problem
from tests.metal_emulator import MetalCompileError, MetalEmulatorError
from tests.metal_emulator.device import emulated_metal
from tests.metal_emulator.survivors import SURVIVORS

# What becomes of what: (pattern, replacement). An integer becomes its successor.
MUTATIONS: tuple[tuple[str, str | None], ...] = (
    (r"(?<=[\w)\]] )\+(?= )", "-"),
    (r"(?<=[\w)\]] )-(?= )", "+"),
    (r"(?<=[\w)\]] )\*(?= )", "+"),
    (r"(?<=[\w)\]] )/(?= )", "*"),
    (r"(?<=[\w)\]] )%(?= )", "/"),
    (r"\+=", "-="),
    (r"\*=", "+="),
    (r"(?<= )<(?= )", "<="),
    (r"(?<= )<=(?= )", "<"),
    (r"(?<= )>(?= )", ">="),
    (r"(?<= )==(?= )", "!="),
    (r"(?<= )!=(?= )", "=="),
    (r"&&", "||"),
    (r"\|\|", "&&"),
    (r"(?<=[(,=?:] )-(?=\w)", ""),
    (r"(?<=[(])-(?=\w)", ""),
    (r"\bHk\b", "Hv"),
    (r"\bHv\b", "Hk"),
    (r"\bDk\b", "Dv"),
    (r"\bDv\b", "Dk"),
    (r"\btrue\b", "false"),
    (r"\b0\.0f", "1.0f"),
    (r"\b1\.0f", "2.0f"),
    (r"metal::max\b", "metal::min"),
    (r"metal::min\b", "metal::max"),
    (r"threadgroup_barrier\(.*?\);", ";"),
    (r"(?<![\w.])(\d+)(?![\w.])", None),
)
TIME_LIMIT_S = 10


@dataclass(frozen=True, order=True)
class Mutant:
    """`line` of `kernel` reads so after the change; `text` is the whole kernel."""

    kernel: str
    line: str
    place: int
    text: str


def mutants(kernel: str) -> list[Mutant]:
    """Every change of MUTATIONS at every place in the code of `kernel`."""
    text = source(kernel)
    code = re.sub(r"//[^\n]*", lambda comment: " " * len(comment[0]), text)
    found = {}
    for pattern, replacement in MUTATIONS:
        for match in re.finditer(pattern, code):
            new = str(int(match[0]) + 1) if replacement is None else replacement
            changed = text[: match.start()] + new + text[match.end() :]
            start = text.rfind("\n", 0, match.start()) + 1
            line = changed[start : changed.find("\n", match.start())].split("//")[0].strip()
            found[changed] = Mutant(kernel, line, match.start(), changed)
    return sorted(found.values(), key=lambda mutant: mutant.place)


def check(results: Iterable[mx.array], expected: Iterable[np.ndarray]) -> None:
    assert reference.within_tolerance(results, expected)


def run_conv() -> None:
    for T, B, K, values, key_heads, key_dim in ((11, 2, 4, 40, 2, 32), (9, 1, 2, 72, 1, 64), (8, 3, 4, 8, 3, 32)):
        heads = {"key_heads": key_heads, "key_dim": key_dim}
        inputs = conv_problem(T, B=B, K=K, values=values, **heads)
        check(causal_conv1d(*inputs, **heads), reference.causal_conv1d(*inputs, **heads))
        quiet = [inputs[0] * 1e-4, inputs[1], inputs[2] * 1e-4]
        check(causal_conv1d(*quiet, **heads), reference.causal_conv1d(*quiet, **heads))
    x, weight, conv_state = conv_problem(6)
    heads = {"key_heads": 2, "key_dim": 32}
    *_, columns = causal_conv1d(x, weight, conv_state, **heads, mask=mx.arange(6)[None] < mx.array([[2], [5]]))
    wanted = [mx.concatenate([conv_state[b], x[b, :end]])[-3:] for b, end in ((0, 2), (1, 5))]
    check([columns], [reference.float64(mx.stack(wanted))])


def run_step() -> None:
    sizes = (
        {"Dv": 72},
        {"B": 1, "Hk": 1, "group": 1, "Dv": 264},
        {"B": 1, "Hk": 1, "group": 3, "Dk": 96, "Dv": 8},
        {"B": 3, "group": 1, "Dk": 64, "K": 2},
    )
    for size in sizes:
        inputs = step_problem(**size)
        check(gated_delta_step(*inputs), reference.gated_delta_step(*inputs))
    (qkv, *gates), weights, conv_state, state = apart = step_problem()
    joined, starts = as_one_matmul_gives_them(apart[0])
    check(gated_delta_step(joined, *apart[1:], starts), reference.gated_delta_step(*apart))
    for scale in (1e-4, 30.0):
        inputs = (qkv * 1e-4, *(gate * scale for gate in gates)), weights, conv_state * 1e-4, state * 1e-4
        check(gated_delta_step(*inputs), reference.gated_delta_step(*inputs))


def delta_problems() -> list[list[mx.array]]:
    return [
        problem(5, Dv=24),
        problem(21, B=1, Hk=1, group=3, Dk=64, Dv=72),
        problem(35, B=3, Hk=2, group=1, Dk=96, Dv=8),
        problem(7, B=1, Hk=1, Dk=128, Dv=40, dtype=mx.bfloat16),
        adversarial_problem("zero_decay", 20, B=1, Hk=1, Dv=8),
        adversarial_problem("near_equal_keys_full_writes", 40, B=1, Hk=1, Dv=8),
    ]


def run_scan() -> None:
    for inputs in delta_problems():
        o, state, tape = gated_delta_scan(*inputs)
        check((o, state, tape.delta), reference.gated_delta_scan(*inputs))


def run_replay() -> None:
    for *tokens, state in delta_problems():
        tape = Tape(tokens[1], tokens[3], recurrent_gated_delta_scan(*tokens, state)[2])
        _, wanted, _ = reference.gated_delta_scan(*(x[:, :4] for x in tokens), state)
        check([gated_delta_replay(state, tape, 4)], [wanted])


def run_chunk() -> None:
    for inputs in delta_problems():
        check(metal_gated_delta_chunk(*inputs), reference.gated_delta_rule(*inputs))


def run_sum() -> None:
    for x, update, gain, eps in (random_sum(replace(SIZES, hidden_size=D)) for D in (64, 257, 300)):
        for scale in (1.0, 1e-3):
            total, normed = add_rms_norm(scale * x, scale * update, gain, eps)
            norm = reference.rms_norm(reference.float64(total), gain, eps)
            check([total, normed], [reference.float64(scale * x) + reference.float64(scale * update), norm])


def run_heads() -> None:
    for sizes in (SIZES, replace(SIZES, head_dim=160, rotary_dim=128, query_heads=4, kv_heads=3)):
        *projected, norms, offset = random_heads(sizes)
        projected = [mx.concatenate([x, 1e-3 * x, 0.5 * x], axis=1) for x in projected]  # three tokens
        projected = [mx.concatenate([x, -x], axis=0) for x in projected]  # of two sequences
        check(qk_norm_rope(*projected, norms, offset), reference.qk_norm_rope(*projected, norms, offset))


SIZES = AttentionSizes(hidden_size=64, query_heads=2, kv_heads=1, head_dim=64, rotary_dim=64, dtype=mx.float32)
RUNS: dict[str, Callable[[], None]] = {
    "causal_conv1d": run_conv,
    "gated_delta_step": run_step,
    "gated_delta_scan": run_scan,
    "gated_delta_replay": run_replay,
    "gated_delta_chunk": run_chunk,
    "add_rms_norm": run_sum,
    "qk_norm_rope": run_heads,
}


def verdict(mutant: Mutant) -> str:
    """What noticed the mutant, or "nothing"."""
    kept, backend.source = backend.source, lambda _: mutant.text
    try:
        with emulated_metal(timeout_s=TIME_LIMIT_S, allow=()):
            RUNS[mutant.kernel]()
    except MetalCompileError:
        return "the compiler"
    except MetalEmulatorError as error:
        return f"the emulator: {error.kinds[0]}"
    except AssertionError:
        return "a value"
    finally:
        backend.source = kept
    return "nothing"


def report(results: list[tuple[Mutant, str]]) -> int:
    """Print what noticed how many; the exit code."""
    for kernel in dict.fromkeys(mutant.kernel for mutant, _ in results):
        counts = Counter(by.split(":")[0] for mutant, by in results if mutant.kernel == kernel)
        print(f"{kernel:20}", ", ".join(f"{count} by {by}" for by, count in counts.most_common()))
    kinds = Counter(by.split(": ")[1] for _, by in results if ": " in by)
    print("the emulator's:", ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()))
    survived = Counter((mutant.kernel, mutant.line) for mutant, by in results if by == "nothing")
    kernels = {mutant.kernel for mutant, _ in results}
    explained = {key for key in SURVIVORS if key[0] in kernels}
    print(f"{len(results)} mutants, {sum(survived.values())} not noticed, {len(explained & survived.keys())} explained")
    for kernel, line in survived.keys() - explained:
        print(f"NOT EXPLAINED  {kernel}: {line}")
    for kernel, line in explained - survived.keys():
        print(f"STALE REASON   {kernel}: {line}")
    return int(survived.keys() != explained)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", choices=RUNS, action="append", help="only this one; may be repeated")
    kernels = parser.parse_args().kernel or list(RUNS)
    todo = [mutant for kernel in kernels for mutant in mutants(kernel)]
    with tempfile.TemporaryDirectory() as cache:
        # A build for each mutant would stay behind in the tests' own cache.
        os.environ["METAL_EMULATOR_CACHE"] = cache
        with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
            results = []
            for mutant, by in zip(todo, pool.map(verdict, todo, chunksize=4)):
                results.append((mutant, by))
                if len(results) % 50 == 0:
                    print(f"{len(results)} of {len(todo)} mutants", file=sys.stderr, flush=True)
    return report(results)


if __name__ == "__main__":
    sys.exit(main())
