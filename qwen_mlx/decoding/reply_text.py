"""The tokens of an answer as text, and where it ends.

In: tokens, one by one. Out: the text that may be shown now, and on the last token why it is the last.
"""

from collections.abc import Collection, Sequence

from qwen_mlx.decoding.stop import StopStrings
from qwen_mlx.tokenizer import Tokenizer


class ReplyText:
    """One answer: it ends at a token of `ends`, before a stop string, or after `count` tokens."""

    def __init__(self, tokenizer: Tokenizer, *, ends: Collection[int], stops: Sequence[str], count: int) -> None:
        self._detokenizer, self._stops = tokenizer.detokenizer(skip_special_tokens=True), StopStrings(stops)
        self._ends, self._left = ends, count

    def add(self, token: int) -> tuple[str, str | None]:
        """The text that `token` completes, empty while a character or a stop string may still be open; and "stop" or
        "length" where the answer is over."""
        self._left -= 1
        text, met = ("", False) if token in self._ends else self._stops.feed(self._detokenizer.add(token))
        finish = "stop" if met or token in self._ends else None if self._left else "length"
        if finish and not met:
            rest, met = self._stops.feed(self._detokenizer.finish())
            text += rest + ("" if met else self._stops.flush())
        return text, finish
