"""Sensitivities against models that are really quantized, and the allocation against every allocation there is."""

import math
from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from scipy.special import rel_entr, softmax

from qwen_mlx.convert.recipes import Form, bits_per_weight
from qwen_mlx.convert.sensitivity import allocate, in_form, quantizable, sensitivity
from qwen_mlx.load import load_model
from tests.golden import checkpoints

Losses = dict[str, dict[Form, float]]
FORMS = [Form(bits, 32) for bits in (2, 4, 8)]
WINDOWS = [mx.array(np.random.RandomState(6).randint(0, checkpoints.ORDINARY_IDS, n)) for n in (24, 9)]
VARIANTS = ["a-r1-d32", "b-r2-d64", "d-moe"]  # tied, untied, experts


@pytest.fixture(scope="module", params=VARIANTS)
def folder(request: pytest.FixtureRequest, checkpoint_of: Callable[[str], Path]) -> Path:
    return checkpoint_of(request.param)


@pytest.fixture(scope="module")
def measured(folder: Path) -> Losses:
    model = load_model(folder, dtype="float32")
    return sensitivity(model, WINDOWS, FORMS, vocab_size=checkpoints.REAL_IDS)


def predictions(folder: Path, path: str | None = None, form: Form | None = None) -> np.ndarray:
    """Probabilities of the tokens there are, by a model of which MLX quantized one module."""
    model = load_model(folder, dtype="float32")
    if form is not None:
        of = {"group_size": form.group_size, "bits": form.bits, "mode": form.mode}
        modules = dict(model.named_modules())
        modules[path].weight = modules[path].weight.astype(mx.bfloat16)
        nn.quantize(model, class_predicate=lambda name, module: of if name == path else False)
        quantized = dict(model.named_modules())[path]  # and read as a checkpoint is, with float32 activations
        quantized.scales, quantized.biases = quantized.scales.astype(mx.float32), quantized.biases.astype(mx.float32)
    logits = [np.array(model(window[None])[0, :-1].astype(mx.float32), np.float64) for window in WINDOWS]
    return softmax(np.concatenate(logits)[:, : checkpoints.REAL_IDS], axis=-1)


@pytest.mark.parametrize(
    "path", ["model.embed_tokens", "model.layers.0.linear_attn.out_proj", "model.layers.3.self_attn.v_proj", "end"]
)
def test_a_sensitivity_is_the_divergence_of_a_model_quantized_there(folder: Path, measured: Losses, path: str) -> None:
    path = path if path in measured else [*measured][-1]
    original = predictions(folder)
    for form in FORMS:
        expected = rel_entr(original, predictions(folder, path, form)).sum(-1).mean()
        assert measured[path][form] == pytest.approx(expected, rel=0.02, abs=2e-6)


def test_every_matrix_is_measured_in_every_form_that_it_may_take(folder: Path, measured: Losses) -> None:
    matrices = {name: m for name, m in load_model(folder).named_modules() if hasattr(m, "to_quantized")}
    assert measured.keys() == matrices.keys()
    gates = {path for path in measured if path.endswith(("in_proj_a", "in_proj_b", "mlp.gate", "shared_expert_gate"))}
    assert all([*losses] == ([Form(8, 32)] if path in gates else FORMS) for path, losses in measured.items())
    assert gates


def test_more_bits_lose_less(measured: Losses) -> None:
    totals = [sum(losses[form] for losses in measured.values() if form in losses) for form in FORMS]
    assert totals[0] > 2 * totals[1] > 4 * totals[2] > 0


def test_forms_whose_groups_do_not_divide_the_rows_are_left_out(checkpoint_of: Callable[[str], Path]) -> None:
    model = load_model(checkpoint_of("c-r3-d128"), dtype="float32")
    found = sensitivity(model, WINDOWS[1:], [Form(4, 128)], vocab_size=checkpoints.REAL_IDS)
    # Hidden size 192, intermediate 320; only what reads attention's 512 and the delta rule's 768 values has such rows.
    assert {path.rpartition(".")[2] for path in found} == {"o_proj", "out_proj"}


def test_the_model_is_left_as_it_was(checkpoint_of: Callable[[str], Path]) -> None:
    model = load_model(checkpoint_of("a-r1-d32"), dtype="float32")
    before = {name: np.array(array) for name, array in tree_flatten(model.parameters())}
    sensitivity(model, WINDOWS[1:], [Form(2, 64)], vocab_size=checkpoints.REAL_IDS)
    for name, array in tree_flatten(model.parameters()):
        np.testing.assert_array_equal(array, before[name])


def test_progress_ends_at_its_total(checkpoint_of: Callable[[str], Path]) -> None:
    told: list[tuple[int, int]] = []
    model = load_model(checkpoint_of("a-r1-d32"), dtype="float32")
    count = len(quantizable(model))
    sensitivity(
        model, WINDOWS[1:], [Form(8, 64)], vocab_size=checkpoints.REAL_IDS, progress=lambda *seen: told.append(seen)
    )
    assert told == [(9 * n, 9 * count) for n in range(count + 1)]


def test_a_quantized_model_is_refused(checkpoint_of: Callable[[str], Path]) -> None:
    model = load_model(checkpoint_of("a-r1-d32"), dtype="float32")
    nn.quantize(model, group_size=64, bits=8)
    with pytest.raises(ValueError, match="quantized already"):
        sensitivity(model, WINDOWS, FORMS, vocab_size=checkpoints.REAL_IDS)


@pytest.mark.parametrize(("bits", "group_size", "mode"), [(4, 64, "affine"), (3, 32, "affine"), (4, 32, "mxfp4")])
def test_in_form_is_what_a_quantized_layer_multiplies_by(bits: int, group_size: int, mode: str) -> None:
    layer = nn.Linear(128, 16, bias=False)
    weight = layer.weight.astype(mx.bfloat16)
    layer.weight = weight
    packed = layer.to_quantized(group_size, bits, mode)
    if mode == "affine":
        packed.scales, packed.biases = packed.scales.astype(mx.float32), packed.biases.astype(mx.float32)
    identity = packed(mx.eye(128)).T
    np.testing.assert_allclose(in_form(weight, Form(bits, group_size, mode)), identity, atol=1e-6)


def random_problem(seed: int) -> tuple[Losses, dict[str, int]]:
    """Four matrices of unlike sizes; losses that fall with the bits, but not neatly."""
    r = np.random.RandomState(seed)
    forms = [Form(bits) for bits in (2, 3, 4, 8)]
    losses = {path: dict(zip(forms, sorted(r.rand(4) ** 3, reverse=True))) for path in "abcd"}
    return losses, {path: int(r.randint(1, 20)) for path in "abcd"}


def total(losses: Mapping[str, Mapping[Form, float]], chosen: Mapping[str, Form]) -> float:
    return sum(losses[path][form] for path, form in chosen.items())


def best(losses: Losses, sizes: dict[str, int], target: float) -> float:
    """The least loss within `target`, by trying everything."""
    found = math.inf
    for forms in product(*losses.values()):
        chosen = dict(zip(losses, forms))
        if bits_per_weight(sizes, chosen) <= target:
            found = min(found, total(losses, chosen))
    return found


@pytest.mark.parametrize("seed", range(12))
def test_an_allocation_is_within_its_target_and_near_the_best(seed: int) -> None:
    losses, sizes = random_problem(seed)
    gaps, before = [], math.inf
    for target in np.arange(2.5, 8.6, 0.25):
        chosen = allocate(losses, sizes, target)
        assert bits_per_weight(sizes, chosen) <= target + 1e-9
        found, least = total(losses, chosen), best(losses, sizes, target)
        assert found <= before  # more bits never make it worse
        gaps.append(found - least)
        before = found
    # What greed can lose is the gain of the one step that no longer fitted.
    assert min(gaps) >= -1e-12
    assert max(gaps) <= max(max(of.values()) - min(of.values()) for of in losses.values())
    assert np.mean(gaps) < 0.1 * best(losses, sizes, 2.5)


def test_of_equal_sizes_and_falling_gains_the_allocation_is_the_best() -> None:
    forms = [Form(bits) for bits in (3, 4, 5, 6)]
    losses = {path: {form: scale * 4.0**-form.bits for form in forms} for path, scale in zip("abcd", (1, 3, 9, 40))}
    sizes = dict.fromkeys(losses, 64)
    for target in np.arange(3.5, 6.51, 0.25):
        assert total(losses, allocate(losses, sizes, target)) == pytest.approx(best(losses, sizes, target), rel=1e-12)


def test_bits_that_help_nothing_are_not_spent() -> None:
    losses = {"a": {Form(4): 0.1, Form(8): 0.1}, "b": {Form(4): 0.2, Form(5): 0.3, Form(8): 0.1}}
    assert allocate(losses, {"a": 10, "b": 10}, 8.5) == {"a": Form(4), "b": Form(8)}


def test_floats_are_paid_from_the_budget() -> None:
    losses = {"a": {Form(4): 0.2, Form(8): 0.1}}
    assert allocate(losses, {"a": 96, "norm": 4}, 8.0) == {"a": Form(4)}
    assert allocate(losses, {"a": 96, "norm": 4}, 8.8) == {"a": Form(8)}


def test_a_target_below_the_lowest_forms_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at least 4\.500 .* not 4"):
        allocate({"a": {Form(4): 0.2}}, {"a": 10}, 4)
