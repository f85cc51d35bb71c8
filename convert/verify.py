"""A converted folder, loaded fresh, beside its source: what was lost, in numbers, and whether that is normal.

Both pass a text a layer at a time with float32 activations, so neither has to fit into memory.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from qwen_mlx.convert.source import Source, Tensor
from qwen_mlx.evaluation.measures import Comparison
from qwen_mlx.evaluation.models import BLOCK, Progress, compare_states, hidden_states
from qwen_mlx.load import load_model, set_weights
from qwen_mlx.load_mtp import load_mtp
from qwen_mlx.model.decoder import DecoderLayer
from qwen_mlx.model.mtp import MTPHead
from qwen_mlx.model.qwen import Qwen

# Fewest bits per weight: the largest mean divergence (nats) and the least agreement of a sound conversion. They tell a
# broken one (norms shifted twice: above 5, near 0) from a coarse one, not a good recipe from a better.
BANDS = (
    (14.0, 0.02, 0.95),
    (8.0, 0.05, 0.90),
    (6.0, 0.15, 0.85),
    (5.0, 0.30, 0.75),
    (4.0, 0.80, 0.60),
    (3.0, 1.00, 0.50),
    (0.0, 1.50, 0.40),
)
LEAST_TOKENS = 100  # predicted ones
LEAST_OF_DRAFTS = 0.5  # of the agreement that the source's own draft head has
LEAST_DRAFTS = (
    0.03  # below it a head is no head: norms of the wrong convention leave some 0 %, foreign text 17 % (demo)
)


@dataclass(frozen=True)
class Proof:
    comparison: Comparison
    mtp_agreement: float | None  # share of positions where the draft head foretells the trunk's next token
    mtp_agreement_source: float | None


def verify(
    folder: Path, source: Source, model: Qwen, head: MTPHead | None, windows: Sequence[mx.array], vocab_size: int,
    progress: Progress | None = None,
) -> Proof:  # fmt: skip
    """Compare the model in `folder` with `source`, whose skeletons are `model` and `head`, on `windows` of tokens.

    Raises `CheckpointError` for a folder that does not load, and for logits that are not numbers.
    """
    result = load_model(folder, dtype="float32")
    result_head = load_mtp(folder, result) if head is not None else None
    _fill(model, source.text)
    if head is not None:
        set_weights(head, {name: found.all() for name, found in source.mtp.items()}, mx.float32)
    embedded = [model.embed(window[None]) for window in windows], [result.embed(window[None]) for window in windows]
    mx.eval(embedded)
    total = 2 * sum(window.size for window in windows)
    expected = hidden_states(model, windows, progress and (lambda done, _: progress(done, total)))
    found = hidden_states(result, windows, progress and (lambda done, _: progress(total // 2 + done, total)))
    comparison = compare_states(model.logits, expected, result.logits, found, windows, vocab_size=vocab_size)
    mine = agreement(result, result_head, embedded[1], found) if result_head is not None else None
    theirs = agreement(model, head, embedded[0], expected) if head is not None else None
    return Proof(comparison, mine, theirs)


def agreement(model: Qwen, head: MTPHead, embedded: Sequence[mx.array], hidden: Sequence[mx.array]) -> float:
    """How often `head`, told hidden state t and token t + 1, foretells what `model` itself finds likeliest at t + 1."""
    hits, count = 0, 0
    for e, h in zip(embedded, hidden):
        drafts = head(h[None, :-1], e[:, 1:], head.make_cache())[0]
        for start in range(0, drafts.shape[0], BLOCK):
            told = model.logits(drafts[start : start + BLOCK]).argmax(-1)
            said = model.logits(h[1:][start : start + BLOCK]).argmax(-1)
            hits += int((told == said).sum())
            count += told.size
    return hits / count


def objection(proof: Proof, bits_per_weight: float) -> str | None:
    """Why the result cannot be sound, None where it can."""
    found = proof.comparison
    if found.tokens < LEAST_TOKENS:
        return f"{found.tokens} predicted tokens are too few to tell, {LEAST_TOKENS} at least are needed"
    most_kl, least_agreement = next((kl, least) for fewest, kl, least in BANDS if bits_per_weight >= fewest)
    if not (found.kl_mean <= most_kl and found.top1_agreement >= least_agreement):
        return (
            f"at {bits_per_weight:.2f} bits per weight a mean KL of at most {most_kl} and an agreement of at least "
            f"{least_agreement:.0%} are expected, found are {found.kl_mean:.4f} and {found.top1_agreement:.1%}"
        )
    mine, theirs = proof.mtp_agreement, proof.mtp_agreement_source
    if theirs is not None and theirs < LEAST_DRAFTS:
        return f"the draft head of the source foretells {theirs:.1%} of the next tokens, as no sound one does"
    if mine is not None and theirs is not None and mine < LEAST_OF_DRAFTS * theirs:
        return f"the draft head foretells {mine:.1%} of the next tokens, that of the source {theirs:.1%}"
    return None


def _fill(model: Qwen, tensors: Mapping[str, Tensor]) -> None:
    """Give `model` its weights: those of a layer when it is taken out of the list, the others at once."""

    def read(module: nn.Module, prefix: str, skipped: str | None = None) -> None:
        names = [name for name in tensors if name.startswith(prefix) and not (skipped and name.startswith(skipped))]
        set_weights(module, {name.removeprefix(prefix): tensors[name].all() for name in names}, mx.float32)

    layers, model.model.layers = model.model.layers, []
    read(model, "", skipped="model.layers.")
    model.model.layers = _Layers(layers, lambda place, layer: read(layer, f"model.layers.{place}."))


class _Layers(list[DecoderLayer]):
    """Layers whose weights are read when they are taken out, one after the other."""

    def __init__(self, layers: Sequence[DecoderLayer], read: Callable[[int, nn.Module], None]) -> None:
        super().__init__(layers)
        self._read, self._taken = read, 0

    def pop(self, index: Any = 0) -> DecoderLayer:
        layer = super().pop(index)
        self._read(self._taken, layer)
        self._taken += 1
        return layer
