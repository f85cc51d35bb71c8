"""Logits, hidden states, caches and continuations of six checkpoints against those of transformers."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from qwen_mlx.cache.kv import KVCache
from qwen_mlx.cache.sequence import SequenceCache
from qwen_mlx.model import moe
from qwen_mlx.model.attention import Attention
from qwen_mlx.model.decoder import DecoderLayer
from qwen_mlx.model.gated_deltanet import GatedDeltaNet
from qwen_mlx.model.mlp import MLP
from qwen_mlx.model.moe import SparseMoeBlock
from qwen_mlx.model.qwen import Qwen
from tests.float64_reference import logits as float64_logits
from tests.golden.checkpoints import VARIANTS
from tests.golden.compare import (
    GREEDY_LENGTHS,
    LENGTHS,
    TOLERANCE,
    difference,
    load,
    logits_difference,
    mean_kl,
    sketch_difference,
)

Golden = dict[str, np.ndarray]
INSIDE = 1e-4
"""Limit for hidden and cached values, which are smaller than logits."""
DENSE = [variant for variant, sizes in VARIANTS.items() if sizes.experts is None]


def prompt_logits(model: Qwen, golden: Golden, length: int) -> np.ndarray:
    """[T, V] of the prompt of that length, in one pass."""
    return np.array(model(mx.array(golden[f"prompt_{length}_ids"])[None])[0].astype(mx.float32))


def continuation_logits(
    model: Qwen, prompts: np.ndarray, tokens: np.ndarray, left_padding: list[int] | None = None
) -> np.ndarray:
    """Logits [B, n, V] from which each of `tokens` [B, n] is to be taken: `prompts` [B, T] at once, then one by one."""
    state = model.make_cache(left_padding)
    rows = [model(mx.array(prompts), state)[:, -1]]
    for i in range(tokens.shape[1] - 1):
        rows.append(model(mx.array(tokens[:, i : i + 1]), state)[:, -1])
        mx.eval(state.arrays)
    return np.array(mx.stack(rows, axis=1).astype(mx.float32))


def greedy_logits(model: Qwen, golden: Golden, length: int) -> np.ndarray:
    """[32, V]"""
    prompt, tokens = (golden[name][None] for name in (f"prompt_{length}_ids", f"greedy_{length}_tokens"))
    return continuation_logits(model, prompt, tokens)[0]


def batch_logits(model: Qwen, golden: Golden) -> np.ndarray:
    """[3, 12, V]"""
    padding = (1 - golden["batch_mask"]).sum(axis=1).tolist()
    return continuation_logits(model, golden["batch_ids"], golden["batch_tokens"], padding)


def greedy_difference(golden: Golden, length: int, logits: np.ndarray) -> float:
    return max(
        difference(logits[:, golden["columns"]], golden[f"greedy_{length}_columns"]),
        difference(logits[-1], golden[f"greedy_{length}_last"]),
    )


def batch_difference(golden: Golden, logits: np.ndarray) -> float:
    return max(difference(logits[:, 0], golden["batch_first"]), difference(logits[:, -1], golden["batch_last"]))


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def golden(variant: str) -> Golden:
    return load(variant)


@pytest.fixture(scope="module")
def model(variant: str, model_of: Callable[[str, str], Qwen]) -> Qwen:
    return model_of(variant, "float32")


@pytest.fixture(scope="module")
def after_65(model: Qwen, golden: Golden) -> tuple[dict[str, list[np.ndarray]], SequenceCache]:
    """Outputs [T, D] of layers, mixers, MLPs and the final norm on the prompt of 65 tokens, and the cache behind it."""
    seen: dict[str, list[np.ndarray]] = {"layers": [], "mixers": [], "mlps": []}
    after = model.make_cache()
    with pytest.MonkeyPatch.context() as patch:

        def record(kind: type, name: str) -> None:
            compute = kind.__call__

            def recorded(self: Any, *args: Any) -> Any:
                out = compute(self, *args)
                whole = sum(out) if isinstance(out, tuple) else out  # a layer leaves its last sum to the next
                seen[name].append(np.array(whole[0]))
                return out

            patch.setattr(kind, "__call__", recorded)

        record(DecoderLayer, "layers")
        record(Attention, "mixers")
        record(GatedDeltaNet, "mixers")
        record(SparseMoeBlock if model.config.text.moe else MLP, "mlps")
        hidden = model.hidden(model.embed(mx.array(golden["prompt_65_ids"])[None]), after)
    return seen | {"final_norm": [np.array(hidden[0])]}, after


@pytest.fixture(scope="module")
def logits_of(model: Qwen, golden: Golden) -> Callable[[int], np.ndarray]:
    return cache(lambda length: prompt_logits(model, golden, length))


@pytest.mark.parametrize("length", LENGTHS)
def test_prompt(logits_of: Callable[[int], np.ndarray], golden: Golden, length: int) -> None:
    assert logits_difference(golden, length, logits_of(length)) < TOLERANCE


@pytest.mark.parametrize("length", LENGTHS)
def test_best_token_everywhere_in_a_prompt(logits_of: Callable[[int], np.ndarray], golden: Golden, length: int) -> None:
    assert (logits_of(length).argmax(-1) == golden[f"prompt_{length}_argmax"]).all()


@pytest.mark.parametrize("part", ["layers", "mixers", "mlps"])
def test_every_layer(after_65: tuple[dict[str, list[np.ndarray]], SequenceCache], golden: Golden, part: str) -> None:
    assert difference(np.stack(after_65[0][part])[:, golden["positions"]], golden[part]) < INSIDE


def test_final_norm(after_65: tuple[dict[str, list[np.ndarray]], SequenceCache], golden: Golden) -> None:
    assert difference(after_65[0]["final_norm"][0][golden["positions"]], golden["final_norm"]) < INSIDE


def kept(state: SequenceCache, part: str) -> dict[str, np.ndarray]:
    """`part` of every layer that has it, by its golden name and in the golden order of axes."""
    found = {}
    for i, layer in enumerate(state.layers):
        if part in ("keys", "values") and isinstance(layer, KVCache):
            found[f"{part}_{i}"] = np.array(getattr(layer, part)[0, :, : layer.offset])
        elif part in ("recurrent", "conv") and not isinstance(layer, KVCache):
            found[f"{part}_{i}"] = np.array(getattr(layer, f"{part}_state")[0].swapaxes(-1, -2))
    return found


@pytest.mark.parametrize("part", ["recurrent", "conv", "keys", "values"])
def test_cache_of_every_layer(
    after_65: tuple[dict[str, list[np.ndarray]], SequenceCache], golden: Golden, part: str
) -> None:
    ours = kept(after_65[1], part)
    assert ours.keys() == {name.split(".")[0] for name in golden if name.startswith(part + "_")}
    assert max(sketch_difference(golden, name, values) for name, values in ours.items()) < INSIDE


@pytest.mark.parametrize("length", GREEDY_LENGTHS)
def test_greedy_continuation(model: Qwen, golden: Golden, length: int) -> None:
    # Each step is fed the golden token, so equal choices everywhere are the greedy continuation.
    logits = greedy_logits(model, golden, length)
    assert logits.argmax(-1).tolist() == golden[f"greedy_{length}_tokens"].tolist()
    assert greedy_difference(golden, length, logits) < TOLERANCE


def test_batch_padded_on_the_left(model: Qwen, golden: Golden) -> None:
    logits = batch_logits(model, golden)
    assert logits.argmax(-1).tolist() == golden["batch_tokens"].tolist()
    assert batch_difference(golden, logits) < TOLERANCE


def test_agrees_with_float64(model: Qwen, variant: str, checkpoint_of: Callable[[str], Path]) -> None:
    ids = np.random.RandomState(7).randint(0, 352, 40)
    ours = np.array(model(mx.array(ids)[None])[0])
    assert difference(ours, float64_logits(checkpoint_of(variant), ids.tolist())) < TOLERANCE


@pytest.mark.parametrize("length", [65, 300])
@pytest.mark.parametrize("variant", DENSE, indirect=True)
def test_bfloat16_is_nearer_to_float32_than_transformers_bfloat16(
    variant: str,
    logits_of: Callable[[int], np.ndarray],
    golden: Golden,
    length: int,
    model_of: Callable[[str, str], Qwen],
) -> None:
    rough = prompt_logits(model_of(variant, "bfloat16"), golden, length)
    assert mean_kl(logits_of(length), rough) <= golden[f"bf16_kl_{length}"]


@pytest.mark.parametrize("variant", DENSE, indirect=True)
def test_float16_neither_overflows_nor_strays_as_far_as_bfloat16(
    variant: str, logits_of: Callable[[int], np.ndarray], golden: Golden, model_of: Callable[[str, str], Qwen]
) -> None:
    """M1 and M2 run in float16: three bits more than bfloat16, and a range that ends at 65504."""
    rough = prompt_logits(model_of(variant, "float16"), golden, 300)
    assert np.isfinite(rough).all()
    assert mean_kl(logits_of(300), rough) <= golden["bf16_kl_300"] / 8


@pytest.mark.parametrize("variant", ["d-moe"], indirect=True)
def test_float16_experts_do_not_overflow(golden: Golden, model_of: Callable[[str, str], Qwen]) -> None:
    assert np.isfinite(prompt_logits(model_of("d-moe", "float16"), golden, 300)).all()


@pytest.mark.parametrize("length", [65, 300])
@pytest.mark.parametrize("variant", ["d-moe"], indirect=True)
def test_bfloat16_experts(
    variant: str,
    model: Qwen,
    golden: Golden,
    length: int,
    model_of: Callable[[str, str], Qwen],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With float32's choice of experts, the rest of a mixture errs no more than transformers' dense models.

    Left to itself, a token whose second and third expert lie close takes the other one. That moves its logits by more
    than all other rounding, in any implementation, so that figure measures the prompt.
    """
    choices: list[mx.array] = []
    choose = mx.argpartition

    def record(scores: mx.array, kth: int, axis: int) -> mx.array:
        choices.append(choose(scores, kth, axis=axis))
        return choices[-1]

    monkeypatch.setattr(moe.mx, "argpartition", record)
    exact = prompt_logits(model, golden, length)
    monkeypatch.setattr(moe.mx, "argpartition", lambda *args, **kwargs: choices.pop(0))
    rough = prompt_logits(model_of(variant, "bfloat16"), golden, length)
    assert mean_kl(exact, rough) <= max(load(dense)[f"bf16_kl_{length}"] for dense in DENSE)
