"""The memory preflight: its count against measured peaks, what it chooses, and what it refuses in which words."""

import gc
import importlib
import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from qwen_mlx import PrefixStore, generate, load
from qwen_mlx.cache.kv import KVCache, grown
from qwen_mlx.cache.sizes import kv_bytes_per_token, slab_tokens, state_bytes
from qwen_mlx.cli import run
from qwen_mlx.config import parse_config
from qwen_mlx.decoding import memory, preflight
from qwen_mlx.decoding.autoregressive import decode
from qwen_mlx.decoding.memory import memory_limit
from qwen_mlx.decoding.prefill import prefill
from qwen_mlx.decoding.preflight import STEP_SIZES, Request, check_memory, choose_plan, longest_context
from qwen_mlx.decoding.reuse import Reuse, places_to_keep
from qwen_mlx.decoding.sampling import Sampler, SamplingParams
from qwen_mlx.errors import MemoryLimitError
from qwen_mlx.model.qwen import Qwen
from tests.golden.checkpoints import IM_START, Variant, config
from tests.golden.checkpoints import VARIANTS as SIZES

MODEL, TOKENIZER = load("demo")
NEW = 20
# Sizes at which one thing outweighs the others: what a chunk sees, what it passes through, what is kept.
SHAPES: dict[str, tuple[Variant, int]] = {
    "scores": (Variant(1, 128, (8, 2, 64), (4, 4, 32, 32), (3, 3, 2), tied=True), 1000),
    "feed_forward": (Variant(1, 64, (2, 1, 64), (4, 4, 32, 32), (3, 3, 2), tied=True, intermediate=4096), 300),
    "delta_rule": (Variant(1, 256, (2, 1, 64), (8, 16, 64, 64), (3, 3, 2), tied=True), 400),
    "experts": (Variant(1, 64, (2, 1, 64), (4, 4, 32, 32), (3, 3, 2), tied=True, experts=(8, 4, 512, 512)), 300),
    "keys_and_values": (Variant(1, 128, (8, 8, 64), (2, 2, 32, 32), (3, 3, 2), tied=True, layers=16), 1000),
}


def random_model(sizes: Variant) -> Qwen:
    model = Qwen(parse_config(config(sizes), {}, Path("nowhere")))
    weights = tree_flatten(model.parameters())
    model.load_weights([(name, mx.random.normal(array.shape) * array.shape[-1] ** -0.5) for name, array in weights])
    mx.eval(model.parameters())
    return model


def measured(model: Qwen, work: Callable[[], None]) -> int:
    """Bytes at the peak of `work`, weights included; what others hold is not."""
    weights = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    mx.synchronize()
    gc.collect()
    mx.clear_cache()
    others = mx.get_active_memory() - weights
    mx.reset_peak_memory()
    work()
    mx.synchronize()
    return mx.get_peak_memory() - others


@pytest.mark.parametrize(("name", "kv_bits"), [*((name, None) for name in SHAPES), ("keys_and_values", 8)])
def test_the_count_is_near_the_measured_peak(name: str, kv_bits: int | None) -> None:
    sizes, prompt = SHAPES[name]
    model = random_model(sizes)
    tokens = np.random.default_rng(0).integers(0, 352, prompt).tolist()
    for step_size in (256, 128):

        def work(step_size: int = step_size) -> None:
            cache = model.make_cache(kv_bits=kv_bits)
            sampler = Sampler(SamplingParams(), tokens, vocab_size=384, num_real_tokens=352)
            logits = prefill(model, tokens, cache, step_size=step_size)
            list(decode(model, logits, cache, sampler, count=NEW))

        plan = replace(check_memory(model, prompt, NEW, step_size=step_size, kv_bits=kv_bits, force=True), others=0)
        assert 0.8 < plan.total / measured(model, work) < 1.2


class MessageStarts:
    """In place of a tokenizer: one token begins a message, and nothing is put into words."""

    def token_to_id(self, token: str) -> int:
        return IM_START

    def decode(self, ids: list[int]) -> str:
        return str(ids)


@pytest.mark.parametrize("name", ["scores", "delta_rule", "keys_and_values"])
def test_the_count_with_a_store_is_near_the_measured_peak(name: str) -> None:
    """Five messages: a place that is kept at the first and the last of them."""
    (sizes, prompt), step_size = SHAPES[name], 128
    model, tokenizer = random_model(sizes), MessageStarts()
    tokens = np.random.default_rng(0).integers(0, 352, prompt).tolist()
    for number in range(1, 6):
        tokens[number * prompt // 6] = IM_START

    def work() -> None:
        with Reuse(model, tokens, store=PrefixStore(model)) as text:
            logits = text.read(model, tokenizer, step_size=step_size)  # type: ignore[arg-type]
            sampler = Sampler(SamplingParams(), tokens, vocab_size=384, num_real_tokens=352)
            for token, *_ in decode(model, logits, text.cache, sampler, count=NEW):
                text.tokens.append(token)

    places = len(places_to_keep(tokenizer, tokens, 0, step_size)) + 1  # type: ignore[arg-type]
    options = {"step_size": step_size, "store": PrefixStore(model), "places": places}
    plan = replace(check_memory(model, prompt, NEW, force=True, **options), others=0)
    assert 0.8 < plan.total / measured(model, work) < 1.2


@pytest.fixture
def allowed(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """`allowed(size)`: this device allows so many bytes."""
    return lambda size: monkeypatch.setattr(preflight, "memory_limit", lambda: size)


REQUEST = Request(MODEL.config.text, weights=10**7, dtype=mx.float32)


def test_bytes_follow_from_the_sizes() -> None:
    """f-k32-v64: three linear layers with Hk 2, Hv 4, Dk 32, Dv 64 and one attention layer with Hkv 2, Dh 64."""
    text = parse_config(config(SIZES["f-k32-v64"]), {}, Path("nowhere")).text
    states, windows = 3 * 4 * 64 * 32 * 4, 3 * 3 * (2 * 2 * 32 + 4 * 64) * 2
    assert state_bytes(text, mx.bfloat16) == states + windows
    assert kv_bytes_per_token(text, mx.bfloat16) == 2 * 2 * 64 * 2
    assert kv_bytes_per_token(text, mx.bfloat16, 4) == 2 * 2 * (64 // 2 + 2 * 2)


@pytest.mark.parametrize(("prompt", "new", "step_size"), [(1, 0, 512), (700, 3, 128), (513, 600, 512), (6000, 900, 64)])
def test_slabs_are_as_long_as_the_cache_makes_them(prompt: int, new: int, step_size: int) -> None:
    cache = KVCache()
    sizes = [min(step_size, prompt - start) for start in range(0, prompt, step_size)] + [1] * new
    for size in sizes:
        cache.update(mx.zeros((2, 1, 1, size, 1)))
    assert cache.slab is not None
    assert cache.slab.shape[3] == slab_tokens(prompt, new, step_size)


def test_a_long_slab_is_copied_a_bounded_number_of_times_in_all() -> None:
    length, room, copied = 1 << 20, 0, 0
    while room < length:
        copied += room
        room = grown(room, room + 1)
    assert copied < 10 * length
    assert room <= length * 9 / 8 + 256


@pytest.mark.parametrize("place", range(len(STEP_SIZES)))
def test_the_largest_chunk_that_fits_is_chosen(place: int) -> None:
    totals = [REQUEST.plan(10_000, 100, size).total for size in STEP_SIZES]
    assert sorted(totals, reverse=True) == totals
    assert choose_plan(REQUEST, 10_000, 100, totals[place]).step_size == STEP_SIZES[place]


def test_a_chunk_that_is_asked_for_is_taken() -> None:
    assert choose_plan(REQUEST, 10_000, 100, 1, 333).step_size == 333
    assert choose_plan(REQUEST, 10_000, 100, 1).step_size == STEP_SIZES[-1]
    assert choose_plan(REQUEST, 10_000, 100, None).step_size == STEP_SIZES[0]


def test_the_longest_context_fits_and_the_next_does_not() -> None:
    limit = 10**9
    length = longest_context(REQUEST, limit)
    assert choose_plan(REQUEST, length, 0, limit).total <= limit < choose_plan(REQUEST, length + 2048, 0, limit).total
    assert longest_context(REQUEST, 10**6) == 0


def test_what_does_not_fit_is_refused_with_numbers_and_what_would(allowed: Callable[[int], None]) -> None:
    allowed(300_000_000)
    with pytest.raises(MemoryLimitError) as caught:
        check_memory(MODEL, 262_144, 512)
    said = str(caught.value)
    held = r"(what is held already \d\.\d\d, )?"  # by other tests
    numbers = rf"weights 0\.01, keys and values 1\.\d\d, {held}a chunk of 64 tokens \d\.\d\d"
    assert re.match(
        rf"A text of 262,656 tokens takes \d\.\d\d GB \({numbers}\), and this device allows 0.30 GB: ", said
    )
    fitting, *quantized_ = (int(n.replace(",", "")) for n in re.findall(r"([\d,]+) (?:tokens would|with --kv)", said))
    assert fitting < quantized_[0] < quantized_[1]
    check_memory(MODEL, fitting, 0)
    check_memory(MODEL, quantized_[0], 0, kv_bits=8)
    assert said.endswith("; --force tries it all the same.")


def test_where_nothing_fits_another_model_is_the_remedy(allowed: Callable[[int], None]) -> None:
    allowed(1000)
    with pytest.raises(MemoryLimitError, match="not even its first tokens fit, take a smaller model"):
        check_memory(MODEL, 10, 1)


def test_force_tries_it_all_the_same(allowed: Callable[[int], None]) -> None:
    allowed(1000)
    with pytest.raises(MemoryLimitError):
        generate(MODEL, TOKENIZER, "Once", max_tokens=3)
    assert generate(MODEL, TOKENIZER, "Once", max_tokens=3, force=True)


def test_the_command_refuses_in_one_sentence(
    allowed: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    allowed(1000)
    command = importlib.import_module("qwen_mlx.generate").main
    code = run(lambda: command(["--model", "demo", "--prompt", "Once"]))
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n"), err[:14]) == (2, "", 1, "error: A text ")


def test_what_is_held_beside_the_model_counts(allowed: Callable[[int], None]) -> None:
    allowed(10**12)
    mx.eval(MODEL.parameters())
    before = check_memory(MODEL, 10, 1).others
    held = mx.zeros((10**7,), mx.int8)
    mx.eval(held)
    assert check_memory(MODEL, 10, 1).others - before == pytest.approx(10**7, rel=0.01)


def test_what_a_text_holds_already_is_not_counted_twice(allowed: Callable[[int], None]) -> None:
    allowed(10**12)
    held = mx.zeros((10**7,), mx.int8)
    mx.eval(MODEL.parameters(), held)
    with_it, without = check_memory(MODEL, 10, 1), check_memory(MODEL, 10, 1, held=10**7)
    assert with_it.others - without.others == 10**7


def test_what_will_be_kept_of_a_text_counts() -> None:
    """Its keys and values once more, and states at its places."""
    per_token, states = kv_bytes_per_token(REQUEST.config, mx.float32), state_bytes(REQUEST.config, mx.float32)
    without, plan = REQUEST.plan(5000, 100, 512), replace(REQUEST, store_room=10**12, places=4).plan(5000, 100, 512)
    assert (without.snapshots, plan.snapshots) == (0, 5100 * per_token + 4 * states)
    assert plan.total - without.total == plan.snapshots


def test_no_more_will_be_kept_than_the_store_takes() -> None:
    assert replace(REQUEST, store_room=1000).plan(5000, 100, 512).snapshots == 1000


TEXTS = [[n] * 300 for n in (3, 4, 5)]


def store_of(texts: list[list[int]]) -> PrefixStore:
    """Every text as one piece, the last one used the latest."""
    store = PrefixStore(MODEL, 1 << 30)
    for text in texts:
        cache = MODEL.make_cache()
        mx.eval(MODEL(mx.array([text]), cache), cache.arrays)
        cache.checkpoint()
        store.add(text, cache)
    gc.collect()
    return store


def kept(store: PrefixStore) -> list[bool]:
    return [store.restore([*text, 0], MODEL.make_cache()).cached > 0 for text in TEXTS]


def test_a_store_that_is_full_keeps_nothing_more(allowed: Callable[[int], None]) -> None:
    allowed(10**12)
    store = store_of(TEXTS)
    store.max_bytes = store.nbytes + 1000
    assert check_memory(MODEL, 300, 1, store=store).snapshots == 1000


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_a_store_gives_up_as_much_as_there_must_be_room_for(count: int, allowed: Callable[[int], None]) -> None:
    allowed(10**12)
    store = store_of(TEXTS)
    each, total = store.nbytes // 3, check_memory(MODEL, 300, 1, step_size=64, store=store).total
    allowed(total - count * each + each // 2)
    plan = check_memory(MODEL, 300, 1, step_size=64, store=store)
    assert kept(store) == [place >= count for place in range(3)]
    assert plan.total == pytest.approx(total - count * each, abs=each // 4)


@pytest.mark.parametrize("force", [False, True])
def test_where_not_even_an_empty_store_leaves_room_it_keeps_what_it_has(
    force: bool, allowed: Callable[[int], None]
) -> None:
    allowed(300_000_000)
    store = store_of(TEXTS)
    with nullcontext() if force else pytest.raises(MemoryLimitError, match=r"this device allows 0\.30 GB"):
        check_memory(MODEL, 262_144, 512, store=store, places=4, force=force)
    assert kept(store) == [True, True, True]


def test_linux_says_what_is_available(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "meminfo"
    file.write_text("MemTotal:  9999 kB\nMemAvailable:    5000 kB\n")
    monkeypatch.setattr(memory, "MEMINFO", file)
    mx.clear_cache()
    assert memory_limit() == 5000 * 1024 + mx.get_active_memory()


@pytest.mark.parametrize("content", [None, "MemTotal: 9999 kB\n"])
def test_an_unknown_limit_refuses_nothing(content: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "meminfo"
    if content:
        file.write_text(content)
    monkeypatch.setattr(memory, "MEMINFO", file)
    assert memory_limit() is None
    assert check_memory(MODEL, 10**9, 1).step_size == STEP_SIZES[0]


def test_on_metal_the_device_recommends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "gpu_generation", lambda: 16)
    monkeypatch.setattr(memory.mx, "device_info", lambda: {"max_recommended_working_set_size": 1000})
    assert memory_limit() == 1000


def test_fused_attention_writes_no_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_cpu = REQUEST.plan(100_000, 0, 512).prefill
    monkeypatch.setattr(preflight, "gpu_generation", lambda: 16)
    assert REQUEST.plan(100_000, 0, 512).prefill < on_a_cpu - 512 * 100_000 * 4
    assert replace(REQUEST, kv_bits=8).plan(100_000, 0, 512).prefill > 512 * 100_000 * 4


@pytest.mark.parametrize("size", [0, -1])
def test_a_chunk_without_tokens_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"step_size must be at least 1 token, not {size}"):
        check_memory(MODEL, 10, 1, step_size=size)
