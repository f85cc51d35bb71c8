"""Whether a text goes in circles. In: token ids. Out: yes or no."""

from collections.abc import Sequence

LONGEST = 256
"""Tokens of the longest stretch whose repetition is noticed."""
TIMES, AT_LEAST = 4, 96
"""A stretch is a circle when it stands this often in a row, and all of it together has so many tokens."""
EVERY = 16
"""Tokens between two looks."""


def repeats(tokens: Sequence[int]) -> bool:
    """Whether `tokens` end with one stretch several times over; looks at every 16th token only."""
    if len(tokens) % EVERY or len(tokens) < AT_LEAST:
        return False
    end = list(tokens[-LONGEST * TIMES :])
    for length in range(1, LONGEST + 1):
        whole = length * max(TIMES, -(-AT_LEAST // length))
        # A longer stretch may need fewer tokens: 5 x 20 are more than 6 x 16.
        if whole <= len(end) and end[-whole + length :] == end[-whole:-length]:
            return True
    return False
