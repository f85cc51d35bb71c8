"""The draft length: never much slower than plain decoding, nearly as fast as the best length fixed in hindsight."""

import itertools
import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import speculative
from benchmarks.data import costs as costs_script
from qwen_mlx.decoding.draft_length import Costs, DraftLength

DATA = Path(__file__).parents[2] / "benchmarks" / "data"
ROWS = json.loads((DATA / "step_costs.json").read_text())["rows"]
TRACES = json.loads((DATA / "traces.json").read_text())["traces"]
# Chips of one prediction differ in the unit of time alone.
DISTINCT = {(row["model"], row["prediction"], row["start"]): row for row in ROWS}

K = 4
COSTS = {
    "never_pays": [1 + 1.0 * k for k in range(K + 1)],
    "hardly_pays": [1 + 0.9 * k for k in range(K + 1)],
    "pays_a_little": [1 + 0.5 * k for k in range(K + 1)],
    "pays": [1 + 0.2 * k for k in range(K + 1)],
    "nearly_free": [1 + 0.03 * k for k in range(K + 1)],
    "overhead": [1.0, 1.6, 1.7, 1.8, 1.9],
}
every_cost = pytest.mark.parametrize("rounds", COSTS.values(), ids=COSTS.keys())


def drawn(chance: Callable[[int], float], length: int, seed: int = 0) -> list[int]:
    """How many of K drafts are right at each place of a text; draft j there is right with chance(place + j)."""
    r = random.Random(f"draft {seed}")
    draws = ([r.random() < chance(t + j) for j in range(K)] for t in range(length))
    return [len(list(itertools.takewhile(bool, row))) for row in draws]


def decode(
    length: DraftLength, rounds: Sequence[float], right: Sequence[int], resume: float = 0.0
) -> Iterator[tuple[int, float]]:
    """Decode a text whose last draft must not go beyond its end: k and the seconds of each round."""
    t, paused = 0, False
    while t < len(right):
        k = min(length.choose(), len(right) - t - 1)
        accepted = min(k, right[t])
        yield k, rounds[k] + (resume if k and paused else 0.0)
        length.observe(k, accepted)
        t += 1 + accepted
        paused = k == 0


def fresh(rounds: Sequence[float], start: int | None = None, resume: float = 0.0) -> DraftLength:
    return DraftLength(Costs(tuple(rounds), resume), start=start)


def seconds(rounds: Sequence[float], right: Sequence[int], start: int | None = None, resume: float = 0.0) -> float:
    return sum(taken for _, taken in decode(fresh(rounds, start, resume), rounds, right, resume))


def best_fixed(rounds: Sequence[float], right: Sequence[int]) -> float:
    """Seconds of the best fixed k, from all of them: at[t] is what the text before place t takes, going forward."""

    def fixed(k: int) -> float:
        at = {0: 0.0}
        for t, n in enumerate(right):
            if t in at:
                drafts = min(k, len(right) - 1 - t)
                at[t + 1 + min(drafts, n)] = at[t] + rounds[drafts]
        return at[len(right)]

    return min(map(fixed, range(len(rounds))))


def assert_promises(rounds: Sequence[float], right: Sequence[int], start: int | None = None) -> None:
    taken = seconds(rounds, right, start)
    assert len(right) * rounds[0] / taken >= 0.98
    assert best_fixed(rounds, right) / taken >= 0.95


@pytest.mark.parametrize("trace", TRACES, ids=lambda trace: trace["name"])
@pytest.mark.parametrize("row", DISTINCT.values(), ids=lambda row: f"{row['model']}-{row['prediction']}")
def test_both_promises_hold_on_every_trace_with_every_cost(row: dict, trace: dict) -> None:
    assert_promises(row["rounds_ms"], [int(digit) for digit in trace["right"]], row["start"])


@every_cost
@pytest.mark.parametrize("chance", [0, 0.3, 0.6, 0.9, 1])
@pytest.mark.parametrize("seed", range(3))
def test_both_promises_hold_at_a_constant_acceptance(rounds: list[float], chance: float, seed: int) -> None:
    assert_promises(rounds, drawn(lambda t: chance, 1024, seed))


@every_cost
@pytest.mark.parametrize(("before", "after"), [(0.9, 0.1), (0.1, 0.9)])
@pytest.mark.parametrize("seed", range(3))
def test_both_promises_hold_where_acceptance_changes(
    rounds: list[float], before: float, after: float, seed: int
) -> None:
    assert_promises(rounds, drawn(lambda t: before if t < 512 else after, 1024, seed))


def test_a_text_that_became_easy_is_noticed_within_a_quarter_of_what_was_hard() -> None:
    rounds, hard = COSTS["pays_a_little"], 2048
    easy_at_once = seconds(rounds, [K] * hard)
    assert seconds(rounds, [0] * hard + [K] * hard) < 1.01 * hard + easy_at_once + 0.25 * hard


def test_what_drafting_gained_is_not_lost_on_a_text_that_became_hard() -> None:
    rounds, easy = COSTS["pays_a_little"], 2048
    assert seconds(rounds, [K] * easy + [0] * easy) < seconds(rounds, [K] * easy) + 1.02 * easy


rights = st.lists(st.integers(0, K), min_size=1, max_size=600)
any_rounds = st.lists(st.floats(0.05, 6), min_size=1, max_size=K).map(lambda more: [1.0, *more])


@settings(max_examples=300, deadline=None)
@given(
    rounds=any_rounds.map(sorted),
    right=rights,
    start=st.none() | st.integers(0, 1),
    resume=st.just(0.0) | st.floats(0, 3),
)
def test_no_text_takes_longer_than_a_share_and_two_steps(
    rounds: list[float], right: list[int], start: int | None, resume: float
) -> None:
    assert seconds(rounds, right, start, resume) / rounds[0] <= 1.006 * len(right) + 2.0 + 1e-6


@settings(deadline=None)
@given(rounds=any_rounds, heard=st.lists(st.tuples(st.integers(0, K), st.integers(0, K))))
def test_k_is_within_its_range_whatever_is_heard(rounds: list[float], heard: list[tuple[int, int]]) -> None:
    length, k_max = fresh(rounds), len(rounds) - 1
    for k, accepted in heard:
        assert 0 <= length.choose() <= k_max
        length.observe(min(k, k_max), min(accepted, k, k_max))
    assert 0 <= length.choose() <= k_max


@pytest.mark.parametrize("start", [None, 0])
@pytest.mark.parametrize("rounds", [[1.0, 2.0, 3.1, 4.2, 5.0], [1.0, 1.91, 2.9, 3.9, 4.8], [3.0]], ids=str)
def test_nothing_is_ever_drafted_where_it_cannot_pay(rounds: list[float], start: int | None) -> None:
    assert {k for k, _ in decode(fresh(rounds, start), rounds, [K] * 5000)} == {0}


def test_what_others_drafted_does_not_start_it_where_it_cannot_pay() -> None:
    length = fresh([1.0, 2.0, 3.0])
    for _ in range(100):
        length.observe(2, 2)
    assert length.choose() == 0


def waits(rounds: Sequence[float], tokens: int, resume: float = 0.0) -> list[int]:
    """Plain tokens between the probes of a text that no draft is right in."""
    ks = [k for k, _ in decode(fresh(rounds, start=0, resume=resume), rounds, [0] * tokens)]
    return [len(list(run)) for drafts, run in itertools.groupby(ks, bool) if not drafts]


def test_probes_that_fail_become_rarer_from_32_up_to_1024_tokens() -> None:
    found = waits(COSTS["hardly_pays"], 40_000)[:-1]
    assert all(later >= sooner - 1 for sooner, later in itertools.pairwise(found))
    assert (found[1], found[-1]) == (32, 1024)


def test_probes_take_less_than_half_a_percent_of_a_long_text() -> None:
    tokens = 4096
    lost = seconds(COSTS["hardly_pays"], [0] * tokens, 0) - tokens
    assert 0 < lost < 0.005 * tokens


def test_the_first_probe_waits_until_the_share_has_paid_for_what_it_should_lose() -> None:
    # 1.9 plain steps for 1.75 tokens, if drafts are as good as they are believed to be.
    assert waits(COSTS["hardly_pays"], 100)[0] == pytest.approx(0.15 / 0.006, abs=1)
    assert waits(COSTS["hardly_pays"], 100, resume=0.3)[0] == pytest.approx(0.45 / 0.006, abs=1)


def test_probes_are_rarer_where_it_takes_long_to_resume() -> None:
    few, many = (len(waits(COSTS["pays_a_little"], 2000, resume)) for resume in (1.0, 0.0))
    assert few < 0.8 * many


@every_cost
def test_what_it_takes_to_resume_is_no_matter_while_drafts_go_on(rounds: list[float]) -> None:
    dear, free = ([k for k, _ in decode(fresh(rounds, 1, resume), rounds, [K] * 400)] for resume in (9.0, 0.0))
    assert dear == free


def test_waits_are_short_again_after_drafting_paid() -> None:
    rounds, text = COSTS["pays_a_little"], [0] * 20_000 + [K] * 4_000 + [0] * 400
    ks = [k for k, _ in decode(fresh(rounds), rounds, text)]
    last = max(i for i, k in enumerate(ks) if k == K)
    drafting = [i for i, k in enumerate(ks) if k and i > last]
    assert 32 < max(b - a for a, b in itertools.pairwise(drafting)) < 128


def test_a_start_without_drafts_is_one_plain_round_where_drafts_are_cheap() -> None:
    rounds = COSTS["nearly_free"]
    ks = [k for k, _ in decode(fresh(rounds, start=0), rounds, [K] * 40)]
    assert [i for i, k in enumerate(ks) if k == 0] == [0]


@every_cost
def test_without_a_start_the_first_round_is_best_for_three_right_drafts_in_four(rounds: list[float]) -> None:
    chances = [0.75 * 0.95**j for j in range(K)]
    tokens = [1 + sum(itertools.accumulate(chances[:k], lambda a, b: a * b)) for k in range(K + 1)]
    rates = [n / cost for n, cost in zip(tokens, rounds)]
    assert fresh(rounds).choose() == rates.index(max(rates))


def test_noise_does_not_change_the_length_every_few_rounds() -> None:
    rounds = COSTS["pays"]
    ks = [k for k, _ in decode(fresh(rounds), rounds, drawn(lambda t: 0.7, 4096))]
    assert sum(a != b for a, b in itertools.pairwise(ks)) < 0.08 * len(ks)


@pytest.mark.parametrize("resume", [-0.1, float("nan"), float("inf")])
def test_an_impossible_cost_of_resuming_is_refused(resume: float) -> None:
    with pytest.raises(ValueError, match="resume must be a finite cost"):
        Costs((1.0, 1.5), resume)


@pytest.mark.parametrize("rounds", [(), (1.0, 0.0), (-1.0,), (1.0, float("nan")), (1.0, float("inf"))], ids=str)
def test_impossible_costs_are_refused(rounds: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="rounds must be finite costs above 0"):
        Costs(rounds)


@pytest.mark.parametrize("start", [-1, 3])
def test_a_start_out_of_range_is_refused(start: int) -> None:
    with pytest.raises(ValueError, match="start must be None or from 0 to k_max 2"):
        fresh([1.0, 1.2, 1.4], start)


@pytest.mark.parametrize(("k", "accepted"), [(2, 3), (2, -1), (3, 0)])
def test_impossible_rounds_are_refused(k: int, accepted: int) -> None:
    with pytest.raises(ValueError, match="accepted must be from 0 to k, and k to 2"):
        fresh([1.0, 1.2, 1.4]).observe(k, accepted)


def test_the_file_of_costs_is_what_its_script_makes() -> None:
    assert json.loads(json.dumps(costs_script.table()))["rows"] == ROWS


def test_the_benchmark_ends_in_one_json_line_and_status_0(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        speculative.main(["--replays-only"])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])["replays"]
    assert (ended.value.code, report["broken"], report["lines"]) == (0, 0, len(ROWS) * len(TRACES))


def test_a_broken_promise_ends_the_benchmark_with_status_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speculative, "OF_PLAIN", 1.5)
    with pytest.raises(SystemExit) as ended:
        speculative.main(["--replays-only"])
    assert ended.value.code == 1
