"""The embedded demo model: what transformers made of it, and that it does what its card says."""

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from qwen_mlx import generate, load
from qwen_mlx.hub import resolve
from tests.golden.compare import TOLERANCE
from tests.metal_emulator import recording
from tests.metal_emulator.device import emulated_metal

GOLDEN = json.loads(Path(__file__).with_name("golden").joinpath("demo.json").read_text(encoding="utf-8"))
PROMPTS = [name for name in GOLDEN if name not in ("words", "fresh_tales")]


@pytest.fixture(scope="module")
def demo():
    return load("demo", dtype="float32")


@pytest.fixture(scope="module")
def fresh_loss(demo):
    """Mean loss on the fresh tales with their end token, of any model that reads the demo's tokens."""
    _, tokenizer = demo
    texts = [tokenizer.encode(text + "<|endoftext|>") for text in GOLDEN["fresh_tales"]["texts"]]

    def mean(model):
        total = 0.0
        for ids in texts:
            logits = model(mx.array([ids]))[0, :-1].astype(mx.float32)
            total += nn.losses.cross_entropy(logits, mx.array(ids[1:]), reduction="sum").item()
        return total / sum(len(ids) - 1 for ids in texts)

    return mean


def ask(demo, question, **options):
    return generate(*demo, [{"role": "user", "content": question}], temperature=0.0, **options)


@pytest.mark.parametrize("name", PROMPTS)
def test_prompt_ids_are_those_of_the_tokenizers_library(demo, name):
    assert demo[1].encode(GOLDEN[name]["prompt"]) == GOLDEN[name]["prompt_ids"]


@pytest.mark.parametrize("name", PROMPTS)
def test_first_logits_are_transformers(demo, name):
    logits = demo[0](mx.array([GOLDEN[name]["prompt_ids"]]))[0, -1]
    assert np.abs(np.array(logits) - np.array(GOLDEN[name]["first_logits"])).max() < TOLERANCE


@pytest.mark.parametrize("name", PROMPTS)
def test_greedy_text_is_transformers(demo, name):
    golden = GOLDEN[name]
    assert golden["margin"] > 2 * TOLERANCE, "a near tie proves nothing: choose another prompt"
    text = generate(*demo, golden["prompt"], temperature=0.0, max_tokens=len(golden["tokens"]))
    assert text == golden["text"]


@pytest.mark.parametrize("name", ["capital", "sum"])
def test_greedy_text_through_the_metal_kernels_is_transformers(demo, name):
    golden = GOLDEN[name]
    with emulated_metal(fma=True), recording() as runs:
        text = generate(*demo, golden["prompt"], temperature=0.0, speculate="off", max_tokens=len(golden["tokens"]))
    assert text == golden["text"]
    assert {run.name for run in runs} >= {"qwen_qk_norm_rope", "qwen_add_rms_norm", "qwen_gated_delta_step"}


def test_loss_on_fresh_tales_is_transformers(demo, fresh_loss):
    assert fresh_loss(demo[0]) == pytest.approx(GOLDEN["fresh_tales"]["mean_loss"], abs=1e-4)


@pytest.mark.parametrize(("dtype", "most"), [("bfloat16", 1.01), ("float16", 1.001)])
def test_16_bits_lose_little_on_fresh_tales(dtype, most, fresh_loss):
    model, _ = load("demo", dtype=dtype)
    assert np.exp(fresh_loss(model) - GOLDEN["fresh_tales"]["mean_loss"]) < most


@pytest.mark.parametrize(("bits", "growth"), [(8, 1.01), (4, 1.05), (3, 1.3)])
def test_quantized_perplexity_grows_as_that_of_real_models(fresh_loss, bits, growth):
    model, _ = load("demo", dtype="float32")
    for _, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):  # rounded as stored; a CPU multiplies packed weights slowly
            packed = mx.quantize(module.weight, group_size=64, bits=bits)
            module.weight = mx.dequantize(*packed, group_size=64, bits=bits)
    assert np.exp(fresh_loss(model) - GOLDEN["fresh_tales"]["mean_loss"]) < growth


def test_it_writes_dictionary_words(demo):
    words = [w.strip('.,"!?').lower() for w in ask(demo, "Tell me a story.", max_tokens=200).split()]
    assert len(words) > 40
    assert set(words) <= set(GOLDEN["words"])


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("What is the capital of Norway?", "The capital of Norway is Oslo."),
        ("What is the opposite of hot?", "The opposite of hot is cold."),
        ("What is 2 + 6?", "2 + 6 = 8"),
        ("What day comes after Monday?", "Tuesday comes after Monday."),
        ("Who wrote Hamlet?", "I am sorry, I do not know that. I am only a tiny demo model."),
    ],
)
def test_it_answers(demo, question, answer):
    assert ask(demo, question) == answer


def test_it_thinks_when_asked(demo):
    thought, _, answer = ask(demo, "What is 4 + 3?", thinking=True).partition("</think>")
    assert "The sum is 7." in thought
    assert answer.strip() == "4 + 3 = 7"


def test_the_folder_is_a_released_checkpoint_of_under_six_megabytes():
    folder = resolve("demo")
    names = set(mx.load(str(folder / "model.safetensors")))
    assert any(name.startswith("mtp.") for name in names)
    assert "model.language_model.embed_tokens.weight" in names
    assert (folder / "model.safetensors").stat().st_size < 6_000_000
