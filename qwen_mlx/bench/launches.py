"""`python -m qwen_mlx.bench launches MODEL`: the kernels that a decoded token launches on Metal, beside mlx-lm's.

Counted in the graphs of both, on any machine; no weight is read. The last line of stdout is one JSON object.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from qwen_mlx.bench.launch_count import count_step
from qwen_mlx.bench.launch_peer import count_peer_step
from qwen_mlx.bench.model_peer import load_peer
from qwen_mlx.cli import Parser
from qwen_mlx.config import FULL
from qwen_mlx.hub import DEFAULT_MODEL, resolve
from qwen_mlx.kernels.backend import gpu_generation
from qwen_mlx.load import load_model
from qwen_mlx.model.projection import fuse_projections

Count = Callable[[Sequence[int] | None], Counter[str]]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(prog="qwen-mlx bench launches", description=str(__doc__).split("\n\n")[0].split(": ", 1)[1])
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL, help=f"folder, hub id, or demo ({DEFAULT_MODEL})")
    folder = resolve(parser.parse_args(arguments).model)
    peer = load_peer(folder)
    model = load_model(folder, dtype="bfloat16")
    if gpu_generation() is None:
        fuse_projections(model)  # as loading does on Metal
    text = model.config.text
    tables = {
        "qwen_mlx": ledger(lambda layers: count_step(model, layers), text.layer_types),
        "mlx-lm": ledger(lambda layers: count_peer_step(peer, text, layers), text.layer_types),
    }
    print(*_lines(tables), sep="\n")
    print(json.dumps({"bench": "launches", "model": folder.name, "layers": len(text.layer_types), **tables}))


def ledger(count: Count, layer_types: Sequence[str]) -> dict[str, Any]:
    """Launches of a whole step, and of each kind of layer: what one more of its kind adds."""
    linear, full = (
        next(i for i, kind in enumerate(layer_types) if (kind == FULL) == wanted) for wanted in (False, True)
    )
    step, both = count(None), count([linear, full])
    kinds = {
        "linear attention layer": count([linear, linear, full]) - both,
        "full attention layer": count([linear, full, full]) - both,
    }
    return {
        "step": {"total": step.total(), **dict(step.most_common())},
        **{kind: {"total": found.total(), **dict(found.most_common())} for kind, found in kinds.items()},
    }


def _lines(tables: dict[str, dict[str, Any]]) -> list[str]:
    lines = []
    for part in ("step", "linear attention layer", "full attention layer"):
        names = dict.fromkeys(name for table in tables.values() for name in table[part])
        width = max(len(part), *(len(name) + 2 for name in names))
        lines.append(f"{part:{width}}  " + "  ".join(f"{engine:>8}" for engine in tables))
        for name in names:
            counts = "  ".join(f"{table[part].get(name, 0):>8}" for table in tables.values())
            lines.append(f"  {name:{width - 2}}  {counts}")
        lines.append("")
    return [*lines, "Launches of one decoded token on Metal, greedily sampled, counted in the graph; views are none."]
