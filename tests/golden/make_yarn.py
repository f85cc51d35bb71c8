"""Writes yarn.npz: what transformers' own Qwen3.5 computes with YaRN, at four times the length it is told to be native.

`python -m tests.golden.make_yarn` needs torch and transformers. Frequencies and attention factors of `SETTINGS` in the
released sizes, and logits of two golden checkpoints. It knows nothing of qwen_mlx.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen3_5TextConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tests.golden.checkpoints import ORDINARY_IDS, build
from tests.golden.make import COLUMNS, _logits, _read
from tests.golden.yarn import LENGTH, SETTINGS, VARIANTS, rope_parameters, with_yarn


def main() -> None:
    torch.set_grad_enabled(False)
    arrays: dict[str, Any] = {"columns": COLUMNS}
    for name, setting in SETTINGS.items():
        config = Qwen3_5TextConfig(
            head_dim=256, max_position_embeddings=262144, rope_parameters=rope_parameters(setting)
        )
        frequencies, factor = ROPE_INIT_FUNCTIONS["yarn"](config)
        arrays |= {f"{name}_frequencies": frequencies.numpy(), f"{name}_factor": np.array(factor)}
    for variant in VARIANTS:
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = build(variant, Path(folder))
            plain = _read(checkpoint, torch.float32)
            ids = np.random.RandomState(4000).randint(0, ORDINARY_IDS, 4 * LENGTH).tolist()
            config = checkpoint / "config.json"
            config.write_text(json.dumps(with_yarn(json.loads(config.read_text()))))
            logits = _logits(_read(checkpoint, torch.float32), ids)
        arrays |= {f"{variant}_ids": np.array(ids, np.int32), f"{variant}_last": logits[-1]}
        arrays[f"{variant}_columns"] = logits[::8, COLUMNS]
        arrays[f"{variant}_effect"] = np.abs(logits - _logits(plain, ids)).max()
    path = Path(__file__).with_name("yarn.npz")
    np.savez_compressed(path, **arrays)
    print(path.stat().st_size, "bytes;", *(f"{n} {a:.3g}" for n, a in arrays.items() if np.ndim(a) == 0))


if __name__ == "__main__":
    main()
