"""The draft head: its hidden states, logits and drafts against those of transformers, and one slot as many."""

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from qwen_mlx import load
from qwen_mlx.hub import resolve
from qwen_mlx.load_mtp import load_mtp
from qwen_mlx.model.mtp import MTPHead
from qwen_mlx.model.qwen import Qwen
from tests.golden.checkpoints import VARIANTS
from tests.golden.compare import MTP_LENGTHS, TOLERANCE, difference, sketch_difference
from tests.golden.compare import load as load_golden

Golden = dict[str, np.ndarray]
CheckpointOf = Callable[[str], Path]
ModelOf = Callable[[str, str], Qwen]
INSIDE = 1e-4
"""Limit for hidden states, which are smaller than logits."""


def slots(model: Qwen, golden: Golden, length: int) -> tuple[mx.array, mx.array]:
    """What the head's slots are given over the prompt of that length: hidden states and next embeddings, [1, n, D]."""
    ids = mx.array(golden[f"prompt_{length}_ids"])[None]
    following = mx.concatenate([ids[:, 1:], mx.array(golden[f"mtp_{length}_next"]).reshape(1, 1)], axis=1)
    return model.hidden(model.embed(ids), model.make_cache()), model.embed(following)


def drafted(model: Qwen, head: MTPHead, golden: Golden, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Outputs [n, D] and logits [n, V] in the prompt's slots, and logits [4, V] from which four drafts are taken."""
    cache = head.make_cache()
    first = y = head(*slots(model, golden, length), cache)
    rows = [model.logits(y)[:, -1]]
    for _ in range(3):
        y = head(y[:, -1:], model.embed(mx.argmax(rows[-1], axis=-1)[:, None]), cache)
        rows.append(model.logits(y)[:, -1])
    return np.array(first[0]), np.array(model.logits(first)[0]), np.array(mx.concatenate(rows))


def assert_golden(model: Qwen, head: MTPHead, golden: Golden, length: int) -> None:
    """Everything that the golden file holds of the head at this length."""
    prompt = f"mtp_{length}_"
    hidden, logits, rows = drafted(model, head, golden, length)
    assert sketch_difference(golden, prompt + "hidden", hidden) < INSIDE
    assert difference(logits[:, golden["columns"]], golden[prompt + "columns"]) < TOLERANCE
    assert difference(rows, golden[prompt + "last"]) < TOLERANCE
    assert rows.argmax(axis=-1).tolist() == golden[prompt + "drafts"].tolist()


@pytest.mark.parametrize("length", MTP_LENGTHS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_hidden_states_logits_and_drafts_are_transformers(
    variant: str, length: int, checkpoint_of: CheckpointOf, model_of: ModelOf
) -> None:
    model = model_of(variant, "float32")
    head = load_mtp(checkpoint_of(variant), model)
    assert_golden(model, head, load_golden(variant), length)


@pytest.mark.parametrize("sizes", [(64, 1), (1, 64), (30, 35), (20, 1, 1, 43)], ids=str)
@pytest.mark.parametrize("variant", ["c-r3-d128", "d-moe"])
def test_slots_in_pieces_are_slots_at_once(
    variant: str, sizes: tuple[int, ...], checkpoint_of: CheckpointOf, model_of: ModelOf
) -> None:
    model = model_of(variant, "float32")
    head = load_mtp(checkpoint_of(variant), model)
    hidden, embeddings = slots(model, load_golden(variant), 65)
    cache = head.make_cache()
    pieces, start = [], 0
    for size in sizes:
        pieces.append(head(hidden[:, start : start + size], embeddings[:, start : start + size], cache))
        start += size
    assert cache.offset == 65
    whole = head(hidden, embeddings, head.make_cache())
    assert difference(np.array(mx.concatenate(pieces, axis=1)), np.array(whole)) < INSIDE


@pytest.mark.parametrize("variant", ["c-r3-d128", "d-moe"])
def test_a_batch_is_its_rows(variant: str, checkpoint_of: CheckpointOf, model_of: ModelOf) -> None:
    model = model_of(variant, "float32")
    head = load_mtp(checkpoint_of(variant), model)
    hidden, embeddings = (x.reshape(5, 13, -1) for x in slots(model, load_golden(variant), 65))
    batch = head(hidden, embeddings, head.make_cache())
    rows = [head(hidden[i : i + 1], embeddings[i : i + 1], head.make_cache()) for i in range(5)]
    assert difference(np.array(batch), np.array(mx.concatenate(rows))) < INSIDE


def test_drafts_that_were_taken_back_leave_no_trace(checkpoint_of: CheckpointOf, model_of: ModelOf) -> None:
    model = model_of("c-r3-d128", "float32")
    head = load_mtp(checkpoint_of("c-r3-d128"), model)
    hidden, embeddings = slots(model, load_golden("c-r3-d128"), 65)
    cache = head.make_cache()
    y = head(hidden[:, :40], embeddings[:, :40], cache)
    before = cache.snapshot()
    for _ in range(3):
        y = head(y[:, -1:], embeddings[:, :1], cache)
    cache.restore(before)
    after = head(hidden[:, 40:], embeddings[:, 40:], cache)
    whole = head(hidden, embeddings, head.make_cache())[:, 40:]
    assert difference(np.array(after), np.array(whole)) < INSIDE


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("variant", ["a-r1-d32", "d-moe"])
def test_the_output_has_the_dtype_of_the_model(
    variant: str, dtype: str, checkpoint_of: CheckpointOf, model_of: ModelOf
) -> None:
    model = model_of(variant, dtype)
    head = load_mtp(checkpoint_of(variant), model)
    y = head(*slots(model, load_golden(variant), 5), head.make_cache())
    assert y.dtype == model.dtype


TALES = ("Once upon a time", "There was once", "Long ago,", "Once there was")


def test_the_demo_drafts_its_own_tales_as_well_as_its_judge_found() -> None:
    """`examples/train_demo/samples.md`, by transformers: of 376 tokens 0.915 right, 0.838 with the one after it."""
    model, tokenizer = load("demo", dtype="float32")
    head = load_mtp(resolve("demo"), model)
    one = two = count = 0
    for prompt in TALES:
        ids, start = greedy(model, tokenizer.encode(prompt), 96)
        hidden = model.hidden(model.embed(mx.array([ids])), model.make_cache())
        cache = head.make_cache()
        for i in range(len(ids) - 3):
            y = head(hidden[:, i : i + 1], model.embed(mx.array([[ids[i + 1]]])), cache)
            if i < start - 1:
                continue
            count += 1
            draft = mx.argmax(model.logits(y), axis=-1)
            if draft.item() == ids[i + 2]:
                one += 1
                before = cache.snapshot()
                again = head(y, model.embed(draft), cache)
                two += mx.argmax(model.logits(again)).item() == ids[i + 3]
                cache.restore(before)
    assert (count, round(one / count, 3), round(two / count, 3)) == (376, 0.915, 0.838)


def greedy(model: Qwen, prompt: list[int], count: int) -> tuple[list[int], int]:
    """The prompt with its greedy continuation, and where that begins."""
    ids, cache = list(prompt), model.make_cache()
    logits = model(mx.array([ids]), cache)[:, -1]
    for _ in range(count):
        ids.append(int(mx.argmax(logits).item()))
        logits, _ = model.step(mx.array([ids[-1:]]), cache)
    return ids, len(prompt)
