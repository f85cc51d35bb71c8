"""Text to text that may be shown: ends a reply before its first stop string.

In: pieces of text, in any split. Out: the part that cannot belong to a stop string, and whether one was met.
Knows no tokens: a stop string may begin in the middle of one.
"""

from collections.abc import Sequence


def stop_tuple(stops: Sequence[str]) -> tuple[str, ...]:
    """One stop string or a sequence of them as a tuple; ValueError for an empty string or something not text."""
    if not isinstance(stops, Sequence):
        raise ValueError(f"stop must be a string or several, not {stops!r}")
    stops = (stops,) if isinstance(stops, str) else tuple(stops)
    for stop in stops:
        if not isinstance(stop, str) or not stop:
            raise ValueError(f"stop must be non-empty strings, not {stop!r}; leave it out to stop at nothing")
    return stops


class StopStrings:
    """Cuts a stream of text before the stop string that is complete first.

    The stop string met is the one that *ends* earliest, so a reply ends as soon as any is complete; of several that
    end at one place the longest counts. Neither it nor anything after it is shown. How the text is split into pieces
    makes no difference to the whole.
    """

    def __init__(self, stops: Sequence[str]):
        self.stops = stop_tuple(stops)
        self._longest = max(map(len, self.stops), default=0)
        self._held = ""
        self._met = False

    def feed(self, text: str) -> tuple[str, bool]:
        """The text that may be shown now, and whether a stop string was met (from then on: nothing, True)."""
        if self._met:
            return "", True
        text = self._held + text
        matches = [(start + len(stop), start) for stop in self.stops if (start := text.find(stop)) >= 0]
        if matches:
            self._held, self._met = "", True
            return text[: min(matches)[1]], True
        shown = len(text) - self._unsafe(text)
        self._held = text[shown:]
        return text[:shown], False

    def flush(self) -> str:
        """The text still held back, to be shown when the stream has ended without a stop string."""
        held, self._held = self._held, ""
        return held

    def _unsafe(self, text: str) -> int:
        """Length of the longest suffix of `text` that could begin a stop string."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self.stops):
                return length
        return 0
