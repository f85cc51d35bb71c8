"""The measures against SciPy in float64, and a text that passes a layer at a time against one that passes the model."""

import json
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from scipy.special import log_softmax, rel_entr, softmax

from qwen_mlx import load
from qwen_mlx.errors import CheckpointError, PromptError
from qwen_mlx.evaluation.measures import Comparison, compare_logits, summarize
from qwen_mlx.evaluation.models import BLOCK, compare, compare_states, hidden_states, perplexity
from qwen_mlx.evaluation.text import cut_windows, read_text
from qwen_mlx.load import load_model
from qwen_mlx.model.qwen import Qwen
from tests.golden import checkpoints

TALES = json.loads((Path(__file__).parent / "golden" / "demo.json").read_text(encoding="utf-8"))["fresh_tales"]
V, PADDING = 50, 6


def some_logits(seed: int, positions: int) -> tuple[mx.array, mx.array, mx.array]:
    """Of a reference and of a model near it, with enormous padding rows, and the tokens that came next."""
    r = np.random.RandomState(seed)
    reference = 4 * r.randn(positions, V + PADDING)
    logits = reference + 0.5 * r.randn(positions, V + PADDING)
    reference[:, V:], logits[:, V:] = 100, 200
    targets = r.randint(0, V, positions)
    return mx.array(reference, mx.float32), mx.array(logits, mx.float32), mx.array(targets)


def expected(blocks: list[tuple[mx.array, mx.array, mx.array]]) -> Comparison:
    """In float64, by SciPy."""
    kl, agrees, nll, nll_reference = [], [], [], []
    for block in blocks:
        p, q = (np.array(a, np.float64)[:, :V] for a in block[:2])
        targets = np.array(block[2])[:, None]
        kl += [*rel_entr(softmax(p, axis=-1), softmax(q, axis=-1)).sum(-1)]
        agrees += [*(p.argmax(-1) == q.argmax(-1))]
        nll_reference += [*-np.take_along_axis(log_softmax(p, axis=-1), targets, -1)]
        nll += [*-np.take_along_axis(log_softmax(q, axis=-1), targets, -1)]
    means = np.exp(np.mean(nll)), np.exp(np.mean(nll_reference))
    return Comparison(len(kl), np.mean(kl), np.quantile(kl, 0.999), np.mean(agrees), *means)


def test_measures_are_those_of_scipy_over_all_positions() -> None:
    blocks = [some_logits(seed, positions) for seed, positions in ((1, 64), (2, 64), (3, 5))]
    found = summarize([compare_logits(*block, V) for block in blocks])
    np.testing.assert_allclose(astuple(found), astuple(expected(blocks)), rtol=2e-5)


def test_a_model_is_no_way_off_from_itself() -> None:
    reference, _, targets = some_logits(1, 64)
    found = summarize([compare_logits(reference, reference, targets, V)])
    assert (found.kl_mean, found.kl_p999, found.top1_agreement) == (0, 0, 1)
    assert found.perplexity == found.perplexity_reference


def test_sixteen_bits_are_widened_before_the_softmax() -> None:
    reference, logits, targets = some_logits(4, 64)
    narrow = reference.astype(mx.bfloat16), logits.astype(mx.bfloat16)
    found = summarize([compare_logits(*narrow, targets, V)])
    wide = summarize([compare_logits(*(a.astype(mx.float32) for a in narrow), targets, V)])
    assert found == wide


def windows_of(*lengths: int, seed: int = 5) -> list[mx.array]:
    r = np.random.RandomState(seed)
    return [mx.array(r.randint(0, checkpoints.ORDINARY_IDS, length)) for length in lengths]


@pytest.mark.parametrize("variant", checkpoints.VARIANTS)
def test_layer_by_layer_is_the_whole_model(variant: str, checkpoint_of: Callable[[str], Path]) -> None:
    windows = windows_of(70, 70, 3)
    model = load_model(checkpoint_of(variant), dtype="float32")
    whole = [model(window[None])[0] for window in windows]
    mx.eval(whole)
    for logits, hidden in zip(whole, hidden_states(model, windows)):
        np.testing.assert_allclose(model.logits(hidden), logits, atol=1e-5)


def test_layer_by_layer_is_the_whole_quantized_model(checkpoint_of: Callable[[str], Path]) -> None:
    windows = windows_of(40)
    model = load_model(checkpoint_of("b-r2-d64"), dtype="float32")
    nn.quantize(model, group_size=64, bits=4)
    whole = model(windows[0][None])[0]
    mx.eval(whole)
    np.testing.assert_allclose(model.logits(hidden_states(model, windows)[0]), whole, atol=1e-5)


def test_a_consumed_model_is_refused(checkpoint_of: Callable[[str], Path]) -> None:
    model = load_model(checkpoint_of("a-r1-d32"), dtype="float32")
    hidden_states(model, windows_of(4))
    with pytest.raises(ValueError, match="consumed by an earlier measurement; load it again"):
        hidden_states(model, windows_of(4))


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def deep(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 layers of about 1.6 MB each in float32."""
    variant = checkpoints.Variant(107, 128, (4, 2, 64), (4, 4, 32, 32), (3, 3, 2), request.param, 32, 768)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(checkpoints.VARIANTS, "deep", variant)
        return checkpoints.build("deep", tmp_path_factory.mktemp("deep"))


def nbytes(module: nn.Module) -> int:
    return sum(array.nbytes for _, array in nn.utils.tree_flatten(module.parameters()))


def test_memory_holds_one_layer_and_the_states(deep: Path) -> None:
    model = load_model(deep, dtype="float32")
    windows = windows_of(16, 16, 16)
    whole, layer = nbytes(model), max(nbytes(layer) for layer in model.model.layers)
    embedding = nbytes(model.model.embed_tokens)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    hidden = hidden_states(model, windows)
    peak = mx.get_peak_memory() - before
    # A layer once as it is read and once in float32, the embedding, and what a layer computes on 16 tokens.
    assert peak < 3 * layer + 2 * embedding + 2**20 < whole / 5
    del hidden
    left = embedding if model.config.text.tie_word_embeddings else 0
    assert mx.get_active_memory() - before <= left + 2**16


def test_progress_is_told_after_every_layer(checkpoint_of: Callable[[str], Path]) -> None:
    told: list[tuple[int, int]] = []
    models = [load_model(checkpoint_of("a-r1-d32"), dtype="float32") for _ in range(2)]
    compare(*models, windows_of(8), vocab_size=V, progress=lambda *seen: told.append(seen))
    assert told == [(n, 16) for n in (0, 2, 4, 6, 8, 8, 10, 12, 14, 16)]


def demo() -> Qwen:
    return load("demo", dtype="float32")[0]


def demo_windows() -> list[mx.array]:
    """The tales whose loss transformers computed, each with its end."""
    tokenizer = load("demo", dtype="float32")[1]
    return [mx.array(tokenizer.encode(f"{text}<|endoftext|>")) for text in TALES["texts"]]


def test_perplexity_is_that_of_transformers() -> None:
    windows = demo_windows()
    assert sum(window.size - 1 for window in windows) == TALES["tokens"]
    assert perplexity(demo(), windows, vocab_size=2048) == pytest.approx(np.exp(TALES["mean_loss"]), rel=1e-4)


def test_a_comparison_has_the_perplexities_of_both_models() -> None:
    windows = demo_windows()[:2]
    found = compare(demo(), load("demo", dtype="bfloat16")[0], windows, vocab_size=2048)
    assert found.perplexity_reference == pytest.approx(perplexity(demo(), windows, vocab_size=2048), rel=1e-6)
    rounded = perplexity(load("demo", dtype="bfloat16")[0], windows, vocab_size=2048)
    assert found.perplexity == pytest.approx(rounded, rel=1e-6)
    assert 0 < found.kl_mean < 1e-3


def test_no_more_logits_than_a_block_are_there_at_once() -> None:
    rows: list[int] = []

    def head(hidden: mx.array) -> mx.array:
        rows.append(len(hidden))
        return hidden

    r = np.random.RandomState(8)
    windows = windows_of(2 * BLOCK + 9, BLOCK + 1, 2)
    states = [mx.array(r.randn(window.size, checkpoints.VOCAB_SIZE)) for window in windows]
    found = compare_states(head, states, head, states, windows, vocab_size=V)
    assert rows[::2] == [BLOCK, BLOCK, 8, BLOCK, 1]
    assert found.tokens == sum(rows[::2])


@pytest.mark.parametrize("measure", [perplexity, lambda model, *a, **k: compare(model, demo(), *a, **k)])
def test_weights_that_are_not_numbers_are_refused(measure: Callable[..., object]) -> None:
    broken = demo()
    broken.model.layers[3].mlp.up_proj.weight *= mx.nan
    with pytest.raises(CheckpointError, match="not numbers"):
        measure(broken, [mx.array([1, 2, 3])], vocab_size=2048)


@pytest.mark.parametrize(
    ("count", "sizes"), [(2, [2]), (10, [10]), (11, [10]), (12, [10, 2]), (25, [10, 10, 5])], ids=str
)
def test_windows_cover_the_text(count: int, sizes: list[int]) -> None:
    windows = cut_windows(range(count), 10)
    assert [window.size for window in windows] == sizes
    assert [int(i) for window in windows for i in window] == [*range(sum(sizes))]


@pytest.mark.parametrize("count", [0, 1])
def test_a_text_too_short_to_predict_is_refused(count: int) -> None:
    with pytest.raises(PromptError, match=f"{count} tokens leaves nothing to predict"):
        cut_windows(range(count))


def test_a_window_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 tokens, not 1"):
        cut_windows([1, 2, 3], 1)


@pytest.mark.parametrize(
    ("data", "reason"), [(b"", "holds no text"), (b" \n\t", "holds no text"), (b"ab\xff", "byte 0xff at place 2")]
)
def test_a_file_without_text_is_refused(data: bytes, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_bytes(data)
    with pytest.raises(PromptError, match=reason):
        read_text(file)


def test_the_sample_is_a_little_of_everything() -> None:
    text = read_text()
    assert 3000 <= len(text.split()) <= 4000
    assert "Apache License 2.0" in text.splitlines()[0]
    scripts = ("a", "é", "ß", "я", "ї", "ώ", "中", "は", "한", "ع", "ש", "ग", "ไ", "🌊", "√")
    kinds = (
        "def ",
        "#include",
        "async function",
        "SELECT",
        '"type": "function"',
        "<tool_call>",
        "<think>",
        "Once upon a time",
    )
    assert [sign for sign in (*scripts, *kinds) if sign not in text] == []
