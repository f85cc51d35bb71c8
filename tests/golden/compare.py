"""What the tests need to hold arrays against the golden data: loading, distances, sketches of large arrays.

In: the name of a variant, arrays to judge. Out: numbers. It knows nothing of models, torch or MLX.
"""

from functools import cache
from pathlib import Path

import numpy as np

TOLERANCE = 5e-4
"""Largest difference of a float32 logit (of size up to 30) between two correct implementations."""
LENGTHS = (1, 5, 63, 64, 65, 130, 300)
"""Prompts; 64 is the chunk of the chunked delta rule."""
GREEDY_LENGTHS = (1, 5, 65)
BATCH_LENGTHS = (5, 17, 33)
MTP_LENGTHS = (5, 65)
WHOLE = 4096
"""Arrays of up to this many elements are stored as they are, larger ones as a sketch."""


@cache
def load(variant: str) -> dict[str, np.ndarray]:
    """Every array of the variant's golden file, by the names listed in README.md."""
    with np.load(Path(__file__).with_name(f"{variant}.npz")) as stored:
        return {name: stored[name] for name in stored.files}


def difference(ours: np.ndarray, golden: np.ndarray) -> float:
    """Largest absolute difference; infinite when anything is not a number. Raises ValueError when shapes differ."""
    if ours.shape != golden.shape:
        raise ValueError(f"shape {ours.shape} is compared with golden shape {golden.shape}")
    worst = np.abs(ours.astype(np.float64) - golden.astype(np.float64)).max()
    return float(worst) if np.isfinite(worst) else float("inf")


def logits_difference(golden: dict[str, np.ndarray], length: int, logits: np.ndarray) -> float:
    """`difference` of logits [T, V] of the prompt of that length: whole last row, stored columns elsewhere."""
    prompt = f"prompt_{length}_"
    return max(
        difference(logits[-1], golden[prompt + "last"]),
        difference(logits[:, golden["columns"]], golden[prompt + "columns"]),
    )


def sketch(name: str, values: np.ndarray) -> dict[str, np.ndarray]:
    """`values` [..., M, N] under `name` when small, else its products with fixed random signs from both sides.

    `name.right` = values @ R / sqrt(N), R [N, 4]; `name.left` = L @ values / sqrt(M), L [4, M]: every element enters
    both, and a transposed array does not pass.
    """
    if values.size <= WHOLE:
        return {name: values.astype(np.float32)}
    rows, columns = values.shape[-2:]
    left, right = _signs(4, rows) / np.sqrt(rows), _signs(columns, 4) / np.sqrt(columns)
    wide = values.astype(np.float64)
    return {f"{name}.right": (wide @ right).astype(np.float32), f"{name}.left": (left @ wide).astype(np.float32)}


def sketch_difference(golden: dict[str, np.ndarray], name: str, values: np.ndarray) -> float:
    """`difference` between the sketch of `values` and the one stored under `name`."""
    return max(difference(part, golden[key]) for key, part in sketch(name, values).items())


def mean_kl(reference: np.ndarray, other: np.ndarray) -> float:
    """Mean over positions of KL(reference || other) in nats; both are logits [T, V]."""
    p, q = (_log_softmax(logits.astype(np.float64)) for logits in (reference, other))
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def _signs(rows: int, columns: int) -> np.ndarray:
    return np.random.RandomState(rows * 1000 + columns).randint(0, 2, (rows, columns)) * 2.0 - 1.0
