"""What each matrix loses by each form, measured alone, and how to spend a budget of bits on it.

In: an unquantized model and windows of tokens. Out: KL divergences by path and form, and a form for each path.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy

import mlx.core as mx
import mlx.nn as nn

from qwen_mlx.convert.recipes import FLOAT_BITS, Form, lowest_bits
from qwen_mlx.evaluation.models import Head, compare_states
from qwen_mlx.model.qwen import Qwen
from qwen_mlx.model.span import make_span

State = tuple[mx.array, mx.array | None]  # the residual stream [1, T, D], and what the last layer adds to it


def sensitivity(
    model: Qwen,
    windows: Sequence[mx.array],
    forms: Sequence[Form],
    *,
    vocab_size: int,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, dict[Form, float]]:
    """KL(model || model with this one matrix in this form), mean in nats over `windows` [T], by path and form.

    Forms with too few bits for the matrix, or groups that do not divide its rows, are left out. `vocab_size` counts the
    tokens there are. Afterwards `model` is as it was. Raises ValueError for a model that is quantized.
    """
    matrices = quantizable(model)
    chosen = possible_forms(matrices, forms)
    probe = _Probe(model, windows, vocab_size)
    total, done = sum(map(len, chosen.values())) * probe.tokens, 0
    found: dict[str, dict[Form, float]] = {path: {} for path in matrices}
    for path, matrix in matrices.items():
        probe.move_to(path)
        for form in chosen[path]:
            if progress:
                progress(done, total)
            with _rounded(matrix, form):
                found[path][form] = probe.divergence()
            done += probe.tokens
    if progress:
        progress(total, total)
    return {path: losses for path, losses in found.items() if losses}


def allocate(
    sensitivities: Mapping[str, Mapping[Form, float]], sizes: Mapping[str, int], target_bits: float
) -> dict[str, Form]:
    """A form for each path: from the lowest ones up, the next bits always go where the divergence falls most per bit.

    `sizes` counts the weights of every path, those without sensitivities included: they stay float. At most
    `target_bits` per weight in all; ValueError where even the lowest forms take more.
    """
    forms = {path: min(losses, key=lambda form: form.bits_per_weight) for path, losses in sensitivities.items()}
    floats = FLOAT_BITS * sum(size for path, size in sizes.items() if path not in forms)
    room = target_bits * sum(sizes.values()) - floats - sum(sizes[p] * f.bits_per_weight for p, f in forms.items())
    if room < 0:
        least = target_bits - room / sum(sizes.values())
        raise ValueError(f"target_bits must be at least {least:.3f} for this model and these forms, not {target_bits}.")
    while True:
        steps = [step for path in forms for step in _steps_up(path, forms[path], sensitivities[path], sizes[path])]
        best = max((step for step in steps if step[1] <= room), default=None, key=lambda step: step[0])
        if best is None:
            return forms
        _, cost, path, forms[path] = best
        room -= cost


def _steps_up(
    path: str, now: Form, losses: Mapping[Form, float], size: int
) -> Iterator[tuple[float, float, str, Form]]:
    """(divergence saved per bit, bits, path, form) for every larger form that saves some."""
    for form, loss in losses.items():
        cost, saved = size * (form.bits_per_weight - now.bits_per_weight), losses[now] - loss
        if cost > 0 and saved > 0:
            yield saved / cost, cost, path, form


def possible_forms(matrices: Mapping[str, nn.Module], forms: Sequence[Form]) -> dict[str, list[Form]]:
    """For each path those of `forms` that have bits enough for the matrix, and groups that divide its rows."""
    return {
        path: [form for form in forms if form.bits >= lowest_bits(path) and form.fits(matrix.weight.shape[-1])]
        for path, matrix in matrices.items()
    }


def quantizable(model: Qwen) -> dict[str, nn.Module]:
    """Every matrix that a form can be given to, by path, in the order in which a text meets them.

    Raises ValueError for a model that is quantized, in part or whole.
    """
    if packed := next((path for path, module in model.named_modules() if hasattr(module, "bits")), None):
        raise ValueError(f"The model is quantized already ({packed}); take its float weights.")
    found = {path: module for path, module in model.named_modules() if hasattr(module, "to_quantized")}
    return {path: found[path] for path in sorted(found, key=lambda path: (_place(path, model), path))}


def in_form(weight: mx.array, form: Form) -> mx.array:
    """The matrix as a model in this form computes with it: rounded from bfloat16, its scales bfloat16, in float32."""
    packed, scales, *biases = mx.quantize(weight.astype(mx.bfloat16), form.group_size, form.bits, mode=form.mode)
    if not biases:
        wide = mx.dequantize(packed, scales, None, form.group_size, form.bits, mode=form.mode)
        return wide.astype(mx.float32)
    scales, bias = scales.astype(mx.float32), biases[0].astype(mx.float32)
    return mx.dequantize(packed, scales, bias, form.group_size, form.bits)


@contextmanager
def _rounded(matrix: nn.Module, form: Form) -> Iterator[None]:
    weight = matrix.weight
    matrix.weight = in_form(weight, form).astype(weight.dtype)
    try:
        yield
    finally:
        matrix.weight = weight


class _Probe:
    """The text in front of one place of the model, so that only what comes behind the place is computed again."""

    def __init__(self, model: Qwen, windows: Sequence[mx.array], vocab_size: int) -> None:
        self.model, self.windows, self.vocab_size = model, windows, vocab_size
        self.tokens = sum(window.size for window in windows)
        self._place, self._states = -1, self._embedded()
        self._head = _head(model)
        self._expected = self._hidden(0, self._states)

    def move_to(self, path: str) -> None:
        """Forward only."""
        place = _place(path, self.model)
        while self._place < place:
            if self._place >= 0:
                self._states = [self._layer(self._place, state) for state in self._states]
                mx.eval(self._states)
            self._place += 1

    def divergence(self) -> float:
        """Mean KL of the model as it is now, changed at the place, from the model as it was at first."""
        start = max(self._place, 0)
        found = self._hidden(start, self._embedded() if self._place < 0 else self._states)
        comparison = compare_states(
            self._head, self._expected, self.model.logits, found, self.windows, vocab_size=self.vocab_size
        )
        return comparison.kl_mean

    def _embedded(self) -> list[State]:
        return [(self.model.embed(window[None]), None) for window in self.windows]

    def _hidden(self, start: int, states: list[State]) -> list[mx.array]:
        """States in front of layer `start` -> hidden states [T, D] after the final norm."""
        hidden = []
        for state in states:
            for n in range(start, len(self.model.model.layers)):
                state = self._layer(n, state)
            hidden.append(self.model.model.norm.of_sum(*state)[1][0])
            mx.eval(hidden[-1])
        return hidden

    def _layer(self, n: int, state: State) -> State:
        span = make_span(state[0].shape[1], 0)
        return self.model.model.layers[n](*state, self.model.make_cache().layers[n], span)


def _place(path: str, model: Qwen) -> int:
    """The layer a path lies in; -1 is the embedding, and the number of layers the head."""
    if match := re.search(r"layers\.(\d+)\.", path):
        return int(match[1])
    return len(model.model.layers) if path == "lm_head" else -1


def _head(model: Qwen) -> Head:
    """The head with the weights it has now, whatever the model is given later."""
    if model.config.text.tie_word_embeddings:
        return copy(model.model.embed_tokens).as_linear
    return copy(model.lm_head)
