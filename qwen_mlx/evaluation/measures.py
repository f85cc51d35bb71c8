"""Logits of a reference and of a model to the numbers that tell them apart.

In: logits [P, V] of both at the same positions, in blocks, and the tokens that came next. Out: a `Comparison`. Knows no
model and no text. All in float32: of 16 bits a softmax over 248,320 tokens keeps too little.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import numpy as np


class Scores(NamedTuple):
    """What a block of positions gave, each [P]."""

    kl: mx.array  # KL(reference || model), nats
    agrees: mx.array  # bool, the same likeliest token
    nll_reference: mx.array  # negative log likelihood of the next token, nats
    nll: mx.array


@dataclass(frozen=True)
class Comparison:
    """How far a model's predictions are from a reference's, over all positions; divergences in nats."""

    tokens: int  # predicted ones
    kl_mean: float
    kl_p999: float  # 99.9th percentile over the positions: how bad it gets
    top1_agreement: float  # share of positions with the same likeliest token
    perplexity: float
    perplexity_reference: float


def log_probabilities(logits: mx.array, vocab_size: int) -> mx.array:
    """logits [P, V] -> log softmax [P, vocab_size], float32, over the tokens there are: the rows behind are padding."""
    logits = logits[:, :vocab_size].astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def likelihood(log_p: mx.array, targets: mx.array) -> mx.array:
    """Negative log likelihood [P] of `targets` [P] under log probabilities [P, V]."""
    return -mx.take_along_axis(log_p, targets[:, None], axis=-1)[:, 0]


def compare_logits(reference: mx.array, logits: mx.array, targets: mx.array, vocab_size: int) -> Scores:
    """Logits [P, V] of the reference and of the model, and the tokens [P] that came next."""
    log_p, log_q = log_probabilities(reference, vocab_size), log_probabilities(logits, vocab_size)
    # Rounding can take the sum a little below zero, where the divergence of two distributions never is.
    kl = mx.maximum((mx.exp(log_p) * (log_p - log_q)).sum(axis=-1), 0)
    agrees = log_p.argmax(axis=-1) == log_q.argmax(axis=-1)
    return Scores(kl, agrees, likelihood(log_p, targets), likelihood(log_q, targets))


def summarize(blocks: Sequence[Scores]) -> Comparison:
    """All blocks as one; mean and percentile over positions, whatever the blocks' sizes."""
    columns = (np.concatenate([np.array(part) for part in column]).astype(np.float64) for column in zip(*blocks))
    kl, agrees, nll_reference, nll = columns
    return Comparison(
        tokens=len(kl),
        kl_mean=float(kl.mean()),
        kl_p999=float(np.quantile(kl, 0.999)),
        top1_agreement=float(agrees.mean()),
        perplexity=_exp(nll.mean()),
        perplexity_reference=_exp(nll_reference.mean()),
    )


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf
