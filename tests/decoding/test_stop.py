"""Stop strings: any split of a stream shows what one look at the whole text would."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_mlx.decoding.stop import StopStrings, stop_tuple

TEXTS = st.text(alphabet="ab", max_size=24)
STOPS = st.lists(st.text(alphabet="ab", min_size=1, max_size=5), max_size=4)


def whole(text: str, stops: list[str]) -> tuple[str, bool]:
    """The definition: the first place where a stop string ends, and the longest one that ends there."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False


def could_begin_a_stop(text: str, stops: list[str]) -> int:
    prefixes = [stop[:n] for stop in stops for n in range(1, len(stop))]
    return max((len(prefix) for prefix in prefixes if text.endswith(prefix)), default=0)


def pieces(text: str, cuts: list[int]) -> list[str]:
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    return [text[i:j] for i, j in pairwise(edges)]


@given(text=TEXTS, stops=STOPS, cuts=st.lists(st.integers(0, 24), max_size=8))
def test_any_split_shows_what_the_whole_text_shows(text: str, stops: list[str], cuts: list[int]) -> None:
    stream = StopStrings(stops)
    shown, met = "", False
    for piece in pieces(text, cuts):
        part, met = stream.feed(piece)
        shown += part
    assert (shown + stream.flush(), met) == whole(text, stops)


@given(text=TEXTS, stops=STOPS)
def test_only_the_longest_possible_beginning_is_held_back(text: str, stops: list[str]) -> None:
    stream = StopStrings(stops)
    shown = ""
    for end, character in enumerate(text, 1):
        part, met = stream.feed(character)
        if met:
            break
        shown += part
        assert len(text[:end]) - len(shown) == could_begin_a_stop(text[:end], stops)


@pytest.mark.parametrize(
    ("stops", "shown"),
    [
        (["\n\n"], "one"),
        (["\n\ntwo"], "one"),
        (["two", "\n"], "one"),
        (["ne\n\nt", "\n"], "one"),
        (["\n", "e\n"], "on"),
        (["o"], ""),
        (["three"], "one\n\ntwo"),
        ([], "one\n\ntwo"),
    ],
    ids=["plain", "to_the_end", "earliest", "first_complete", "longest_at_one_end", "at_start", "none_met", "none"],
)
def test_text_before_the_stop_string(stops: list[str], shown: str) -> None:
    stream = StopStrings(stops)
    part, _ = stream.feed("one\n\ntwo")
    assert part + stream.flush() == shown


def test_without_stops_text_passes_at_once() -> None:
    assert StopStrings(()).feed("anything") == ("anything", False)


def test_nothing_is_shown_after_the_stop_string() -> None:
    stream = StopStrings(["END"])
    stream.feed("a END b")
    assert (stream.feed("c"), stream.flush()) == (("", True), "")


def test_flush_gives_a_held_beginning_once() -> None:
    stream = StopStrings(["END"])
    assert stream.feed("text EN") == ("text ", False)
    assert (stream.flush(), stream.flush()) == ("EN", "")


@pytest.mark.parametrize(("stops", "kept"), [("END", ("END",)), (["a", "b"], ("a", "b")), ([], ())])
def test_stops_become_a_tuple(stops: str | list[str], kept: tuple[str, ...]) -> None:
    assert stop_tuple(stops) == kept


@pytest.mark.parametrize("stops", ["", ["a", ""], [3]])
def test_a_stop_that_is_not_text_is_refused(stops: list[str]) -> None:
    with pytest.raises(ValueError, match="non-empty strings"):
        StopStrings(stops)
