"""What is asked for and what it becomes: modes, lengths that are learnt, and whole texts as they are without drafts."""

import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from qwen_mlx import PrefixStore, PromptCache, SamplingParams, generate, load, stream_generate
from qwen_mlx.decoding import drafting as module
from qwen_mlx.decoding import speculative
from qwen_mlx.decoding.drafters import MTPDrafter, NGramDrafter
from qwen_mlx.decoding.drafting import MOST, SETTLED, Fixed, Learning, Measured, drafting, known_of
from qwen_mlx.decoding.prefill import prefill
from qwen_mlx.decoding.sampling import Sampler
from qwen_mlx.decoding.speculative import Drafting, decode_with_drafts
from qwen_mlx.errors import CheckpointError
from qwen_mlx.generate import GenerationResponse
from qwen_mlx.load import load_model
from qwen_mlx.model.qwen import Qwen
from tests.decoding.test_speculative import Oracle
from tests.golden.checkpoints import build
from tests.golden.compare import TOLERANCE

MODEL, TOKENIZER = load("demo", dtype="float32")
TALE = TOKENIZER.encode("Once upon a time there was a little")
ASKED = [{"role": "user", "content": "How do I fix a car?"}]
GREEDY, DRAWN, SEEDED = SamplingParams(), SamplingParams(temperature=1.0), SamplingParams(temperature=1.0, seed=5)
ModelOf = Callable[[str, str], Qwen]


@pytest.fixture
def headless(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> Qwen:
    """A model from a checkpoint that has no draft head."""
    folder = build("f-k32-v64", tmp_path / "headless")
    tensors = mx.load(str(folder / "model.safetensors"))
    kept = {name: array for name, array in tensors.items() if not name.startswith("mtp.")}
    mx.eval(kept)
    mx.save_safetensors(str(folder / "model.safetensors"), kept, {"format": "pt"})
    return load_model(folder, dtype="float32")


@pytest.mark.parametrize(
    ("mode", "params", "drafter", "lengths"),
    [
        ("auto", GREEDY, MTPDrafter, Learning),
        ("auto", DRAWN, MTPDrafter, Learning),
        ("auto", SamplingParams(seed=5), MTPDrafter, Learning),
        ("mtp", GREEDY, MTPDrafter, Learning),
        ("mtp", SEEDED, MTPDrafter, Fixed),
        ("ngram", DRAWN, NGramDrafter, Learning),
        ("ngram", SEEDED, NGramDrafter, Fixed),
    ],
)
def test_what_a_mode_becomes(mode: str, params: SamplingParams, drafter: type, lengths: type) -> None:
    made = drafting(MODEL, TALE, params, mode)
    assert made is not None
    assert (type(made.drafter), type(made.lengths)) == (drafter, lengths)
    assert made.head is (known_of(MODEL).head if drafter is MTPDrafter else None)


@pytest.mark.parametrize(("mode", "params"), [("off", GREEDY), ("off", SEEDED), ("auto", SEEDED)])
def test_what_is_the_plain_loop(mode: str, params: SamplingParams) -> None:
    assert drafting(MODEL, TALE, params, mode) is None


def test_without_a_head(headless: Qwen) -> None:
    assert drafting(headless, TALE, GREEDY) is None
    assert isinstance(drafting(headless, TALE, GREEDY, "ngram").drafter, NGramDrafter)  # type: ignore[union-attr]
    with pytest.raises(CheckpointError, match=r"headless has no draft head \(mtp\.\*\), so nothing can be speculated"):
        drafting(headless, TALE, GREEDY, "mtp")


@pytest.mark.parametrize("mode", ["", "MTP", "on", None, True])
def test_another_mode_is_refused(mode: Any) -> None:
    with pytest.raises(ValueError, match="speculate must be auto, mtp, ngram, off, not "):
        generate(MODEL, TOKENIZER, TALE, speculate=mode)


@pytest.mark.parametrize("mode", ["mtp", "off"])
@pytest.mark.parametrize("most", [0, -1, True, 1.5, "4", 16])
def test_another_number_of_drafts_is_refused(mode: str, most: Any) -> None:
    """16, as a cache takes back a part of an update of 16 tokens, and a round has one more than drafts."""
    with pytest.raises(ValueError, match="num_draft_tokens must be an integer from 1 to 15, not "):
        generate(MODEL, TOKENIZER, TALE, speculate=mode, num_draft_tokens=most)


@pytest.mark.parametrize("mode", ["mtp", "ngram"])
@pytest.mark.parametrize("most", [1, 15])
def test_a_seed_gives_the_same_text_again(mode: str, most: int) -> None:
    options = {"temperature": 1.0, "seed": 3, "max_tokens": 24, "speculate": mode, "num_draft_tokens": most}
    assert generate(MODEL, TOKENIZER, TALE, **options) == generate(MODEL, TOKENIZER, TALE, **options)


def test_the_head_is_loaded_once_and_freed_with_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, load_mtp = [], module.load_mtp
    monkeypatch.setattr(module, "load_mtp", lambda *given: loaded.append(load_mtp(*given)) or loaded[-1])
    model, _ = load("demo", dtype="float32")
    place = id(model)
    made = [drafting(model, TALE, GREEDY) for _ in range(2)]
    assert len(loaded) == 1
    head = weakref.ref(loaded.pop())
    assert made[0].head is made[1].head is head()  # type: ignore[union-attr]
    del model, made
    gc.collect()
    assert head() is None
    assert place not in module._known


def rounds(lengths: Learning, count: int, *, accepted: int = 0, seconds: Sequence[float] = (1, 1.5, 2)) -> list[int]:
    """The lengths of `count` rounds; each takes what `seconds` has for its length."""
    chosen: list[int] = []
    for _ in range(count):
        chosen.append(lengths.choose())
        lengths.observe(chosen[-1], min(accepted, chosen[-1]), seconds[chosen[-1]])
    return chosen


FIRST = [0]
"""Of a text that measures: it has no step to wait for."""
MEASURED = [0, 0, 0, 1, 0, 0, 2, 0, 0] * 3
"""The rounds that measuring takes at first: of each kind, with two plain ones behind, and so three times."""


@pytest.mark.parametrize("pieces", [(27,), (9,) * 3, (18, 9)], ids=str)
def test_rounds_are_measured_by_plan_whatever_texts_they_are_of(pieces: tuple[int, ...]) -> None:
    measured, chosen = Measured(), []
    for piece in pieces:
        lengths = Learning(measured, 4)
        first, *others = rounds(lengths, 1 + piece)
        assert first == 0
        chosen += others
    assert chosen == MEASURED


def test_texts_too_short_for_a_whole_plan_measure_one_length_each() -> None:
    measured, chosen = Measured(), []
    for _ in range(6):
        chosen += rounds(Learning(measured, 4), 7)
    assert chosen == [0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 2, 0, 0] * 3
    assert measured.costs(4).rounds[:3] == (1, 1.5, 2)


def test_the_texts_behind_the_first_measure_once_more_each() -> None:
    """A machine that was busy then is not believed for ever; and one day it is enough."""
    measured = Measured()
    rounds(Learning(measured, 4), 28, seconds=(1, 9, 9))
    assert measured.costs(4).rounds[1] == 9
    for _ in range(3):
        assert rounds(Learning(measured, 4), 10, seconds=(1, 1.5, 2)) == FIRST + MEASURED[:9]
    assert measured.costs(4).rounds == (1, 1.5, 2.0, 2.5, 3.0)
    assert measured.plan(4) == []
    assert Learning(measured, 4).choose() > 0


def test_what_a_text_leaves_unfinished_the_next_begins_anew() -> None:
    measured = Measured()
    assert rounds(Learning(measured, 4), 12) == FIRST + MEASURED[:11]
    assert rounds(Learning(measured, 4), 19) == FIRST + MEASURED[9:]


def test_the_first_round_of_a_text_is_not_measured() -> None:
    measured = Measured()
    for _ in range(3):
        lengths = Learning(measured, 4)
        lengths.observe(lengths.choose(), 0, 0.001)
        rounds(lengths, 9)
    assert measured.costs(4).rounds[:3] == (1, 1.5, 2)


def test_a_machine_that_becomes_slower_does_not_change_what_drafts_cost() -> None:
    measured = Measured()
    for slower in (1, 2, 4):
        rounds(Learning(measured, 4), 10, seconds=[slower * seconds for seconds in (1, 1.5, 2)])
    assert measured.costs(4).rounds == (1, 1.5, 2.0, 2.5, 3.0)


def test_costs_are_a_line_through_the_medians() -> None:
    """The first of each kind does not count."""
    measured = Measured()
    for k, steps in [(1, 9), (1, 1.5), (1, 1.25), (1, 8), (2, 9), (2, 2.5), (2, 0.5), (2, 2.75)]:
        measured.add(k, steps)
    assert measured.costs(4).rounds == (1, 1.5, 2.25, 3.0, 3.75)
    assert measured.costs(1).rounds == (1, 1.5)


def test_no_round_is_believed_to_take_less_than_a_plain_step() -> None:
    measured = Measured()
    for k in (1, 2) * 3:
        measured.add(k, 0.9)
    assert measured.costs(4).rounds == (1, 1, 1, 1, 1)


def test_what_a_round_leaves_to_those_behind_it_is_its_own() -> None:
    measured = Measured()
    lengths = Learning(measured, 1)
    for seconds in (9, *(2, 2, 2, 3, 2, 2.5) * 3):
        lengths.observe(lengths.choose(), 0, seconds)
    assert measured.costs(1).rounds == (1, 1.75)


@pytest.mark.parametrize("step", [1.0, 3.0], ids=["as it was measured", "slower by now"])
def test_what_it_takes_to_resume_is_measured_whenever_it_happens(step: float) -> None:
    """In plain steps of just before, whatever the machine does otherwise; three times before it is believed."""
    measured = Measured()
    for _ in range(4):
        rounds(Learning(measured, 4), 28)
    lengths = Learning(measured, 4)
    for seconds in (2.3, 2.3, 9.0):
        assert measured.costs(4).resume == 0
        for k, taken in ((0, 1), (0, 1), (0, 1), (1, seconds), (0, 1.2), (0, 1)):
            lengths.observe(k, 0, taken * step)
    assert measured.costs(4).rounds[:2] == (1, 1.5)
    assert measured.costs(4).resume == pytest.approx(2.3 + 0.2 - 1.5)


@pytest.mark.parametrize("others", [(1, 0, 0, 1, 0, 0), (0, 0, 0, 1, 1, 0), (0, 0, 0, 2, 0, 0), (0,) * 6], ids=str)
def test_rounds_that_do_not_resume_tell_nothing_of_it(others: tuple[int, ...]) -> None:
    measured = Measured()
    for _ in range(4):
        rounds(Learning(measured, 4), 28)
    for _ in range(3):
        lengths = Learning(measured, 4)
        for k in others:
            lengths.observe(k, 0, 9.0 if k else 1.0)
    assert measured.costs(4).resume == 0


@pytest.mark.parametrize(("seconds", "accepted", "drafts"), [((1, 1.1, 1.2), 2, True), ((1, 2.2, 3.4), 0, False)])
def test_what_was_measured_decides(seconds: tuple[float, ...], accepted: int, drafts: bool) -> None:
    assert (2 in rounds(Learning(Measured(), 2), 40, accepted=accepted, seconds=seconds)[28:]) == drafts


@pytest.mark.parametrize("most", [1, 2, 3, 15])
def test_no_more_drafts_than_asked_for(most: int) -> None:
    lengths = Learning(Measured(), most)
    chosen = rounds(lengths, 80, accepted=most, seconds=[1 + k / 100 for k in range(16)])
    assert max(chosen) == most


def test_more_drafts_than_an_earlier_text_are_measured_when_asked_for() -> None:
    measured = Measured()
    assert rounds(Learning(measured, 1), 19) == FIRST + [0, 0, 0, 1, 0, 0] * 3
    assert rounds(Learning(measured, 4), 28) == FIRST + [0, 0, 0, 2, 0, 0, 1, 0, 0] * 3


@pytest.mark.parametrize(("generation", "settled"), [(13, SETTLED), (14, SETTLED), (15, 0), (16, 0), (None, 0)])
def test_before_m3_nothing_is_tried_in_a_text_that_is_not_long(
    generation: int | None, settled: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "gpu_generation", lambda: generation)
    assert rounds(Learning(Measured(), 4), SETTLED + 20).index(1) == max(settled, 1) + 3


@pytest.mark.parametrize(("wanted", "count", "told"), [(0, 1, 0), (0, 5, 4), (1, 2, 0), (1, 3, 0), (1, 4, 1)])
def test_only_whole_plain_rounds_are_told_of(wanted: int, count: int, told: int, model_of: ModelOf) -> None:
    """The last token takes no step. One that drafts were looked for at, in vain, was awaited before the next began."""
    model, heard = model_of("f-k32-v64", "float32"), list[int]()

    class Wanted(Fixed):
        def observe(self, k: int, accepted: int, seconds: float) -> None:
            heard.append(k)

    sequence, sampler = model.make_cache(), Sampler(GREEDY, [5], vocab_size=384, num_real_tokens=384)
    logits, made = prefill(model, [5], sequence, step_size=8), Drafting(Oracle([], 0), Wanted(wanted))
    assert len(list(decode_with_drafts(model, logits, sequence, sampler, count=count, drafting=made))) == count
    assert heard == [0] * told


def test_texts_measure_for_those_after_them() -> None:
    model, _ = load("demo", dtype="float32")
    generate(model, TOKENIZER, TALE, speculate="mtp", temperature=0.0, max_tokens=60)
    assert known_of(model).rounds["mtp"].plan(MOST) == [0, 1, 2]  # once more
    assert known_of(model).rounds["ngram"].plan(MOST) == [0, 1, 2] * 3


@pytest.fixture
def four(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many drafts as may be in every round, whatever they take."""
    monkeypatch.setattr(module, "Learning", lambda measured, most: Fixed(most))


def responses(speculate: str, prompt: Any = TALE, **options: Any) -> list[GenerationResponse]:
    return list(stream_generate(MODEL, TOKENIZER, prompt, temperature=0.0, speculate=speculate, **options))


def told(said: Sequence[GenerationResponse]) -> list[tuple[Any, ...]]:
    return [(r.text, r.token, r.generation_tokens, r.prompt_tokens, r.cached_tokens, r.finish_reason) for r in said]


ENDS = {
    **{f"max_tokens_{n}": (TALE, {"max_tokens": n}, "length") for n in range(1, 9)},
    "one_token_of_prompt": ([5], {"max_tokens": 20}, "length"),
    "end_token": (ASKED, {}, "stop"),
    "stop_string": (TALE, {"stop": [" in"]}, "stop"),
    "stop_string_over_tokens": (TALE, {"stop": ["lives", "ved i"]}, "stop"),
}


@pytest.mark.usefixtures("four")
@pytest.mark.parametrize("mode", ["mtp", "ngram"])
@pytest.mark.parametrize(("prompt", "options", "reason"), ENDS.values(), ids=ENDS.keys())
def test_a_text_is_what_it_is_without_drafts(prompt: Any, options: dict[str, Any], reason: str, mode: str) -> None:
    ours, theirs = responses(mode, prompt, **options), responses("off", prompt, **options)
    assert told(ours) == told(theirs)
    assert ours[-1].finish_reason == reason
    for one, other in zip(ours, theirs):
        np.testing.assert_allclose(np.array(one.logprobs), np.array(other.logprobs), atol=TOLERANCE)
    assert [r.draft_tokens for r in ours] == [*accumulate(r.from_draft for r in ours)]
    assert not any(r.from_draft or r.draft_tokens for r in theirs)


@pytest.mark.usefixtures("four")
@pytest.mark.parametrize("name", ["max_tokens_4", "end_token", "stop_string", "stop_string_over_tokens"])
def test_these_texts_end_with_a_draft(name: str) -> None:
    prompt, options, _ = ENDS[name]
    assert responses("mtp", prompt, **options)[-1].from_draft


def broken_off(mode: str, n: int, **options: Any) -> tuple[list[int], PromptCache, PrefixStore]:
    """A text whose consumer takes n tokens: these, and what is kept of it."""
    known, store = PromptCache([], MODEL.make_cache(), MODEL), PrefixStore(MODEL)
    stream = stream_generate(
        MODEL, TOKENIZER, TALE, temperature=0, speculate=mode, prompt_cache=known, prefix_store=store, **options
    )
    tokens = [response.token for response in islice(stream, n)]
    stream.close()  # type: ignore[attr-defined]
    return tokens, known, store


@pytest.mark.usefixtures("four")
@pytest.mark.parametrize("n", range(1, 12))
def test_a_consumer_that_breaks_off_leaves_what_it_has_seen(n: int) -> None:
    tokens, known, store = broken_off("mtp", n, max_tokens=40)
    assert broken_off("off", n, max_tokens=40)[0] == tokens
    assert known.tokens == [*TALE, *tokens]
    assert known.cache.offset == len(known.tokens)
    next_turn_is_a_cold_one(known, store, len(TALE) + n)


@pytest.mark.usefixtures("four")
@pytest.mark.parametrize("n", range(1, 9))
def test_a_text_that_ends_leaves_no_more_than_itself(n: int) -> None:
    """Its last token is not in the cache, but where it was a draft."""
    tokens, known, store = broken_off("mtp", 99, max_tokens=n)
    assert known.tokens == [*TALE, *tokens][: known.cache.offset]
    assert len(TALE) + n - 1 <= known.cache.offset <= len(TALE) + n
    next_turn_is_a_cold_one(known, store, known.cache.offset)


@pytest.mark.usefixtures("four")
def test_interrupted_among_drafts_nothing_is_kept_that_was_not_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def two_rounds() -> Iterator[None]:
        yield from (None, None)
        raise KeyboardInterrupt

    accept, rounds = speculative.accept, two_rounds()
    monkeypatch.setattr(speculative, "accept", lambda *given, **more: (next(rounds), accept(*given, **more))[1])
    known = PromptCache([], MODEL.make_cache(), MODEL)
    with pytest.raises(KeyboardInterrupt):
        responses("mtp", prompt_cache=known)
    monkeypatch.setattr(speculative, "accept", accept)
    assert known.cache.offset == len(known.tokens) > len(TALE)
    next_turn_is_a_cold_one(known, PrefixStore(MODEL), 0)


def next_turn_is_a_cold_one(known: PromptCache, store: PrefixStore, kept: int) -> None:
    prompt = [*known.tokens, *TOKENIZER.encode(" And then")]
    cold = [r.token for r in responses("off", prompt, max_tokens=12)]
    stored = responses("mtp", prompt, max_tokens=12, prefix_store=store)
    assert {r.cached_tokens for r in stored} == {kept}
    assert [r.token for r in stored] == cold
    assert [r.token for r in responses("mtp", prompt, max_tokens=12, prompt_cache=known)] == cold


def test_a_head_that_cannot_be_read_is_a_warning_once(tmp_path: Path) -> None:
    """The model itself is whole, and answers."""
    folder = build("f-k32-v64", tmp_path / "broken")
    tensors = dict(mx.load(str(folder / "model.safetensors")))
    mx.eval(tensors)
    del tensors["mtp.fc.weight"]
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "pt"})
    model = load_model(folder, dtype="float32")
    with pytest.warns(UserWarning, match=r"Nothing is speculated: .*fc\.weight"):
        assert drafting(model, TALE, GREEDY) is None
    assert drafting(model, TALE, GREEDY) is None
    with pytest.raises(CheckpointError, match=r"fc\.weight"):
        drafting(model, TALE, GREEDY, "mtp")
