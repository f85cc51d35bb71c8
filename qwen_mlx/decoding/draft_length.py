"""How many tokens to draft in the next round of speculative decoding: none, where drafting does not pay.

In: what a round with k drafts costs, and after each round how many of its drafts were right. Out: k for the next round.
It knows neither tokens nor the model nor a clock: whoever runs the rounds tells it everything.

A round with k drafts gives 1 + a_1 + a_1 a_2 + ... + a_1 ... a_k tokens, a_j being the chance that draft j is right if
those before it were (arXiv 2211.17192, section 3.1, with a chance for each position). The k that makes most of its time
is taken.
"""

import math
from dataclasses import dataclass

PRIOR, PRIOR_ROUNDS = 0.75, 6.0
"""The chance of a first draft before anything is known, and how many rounds this belief is worth."""
DEEPER, DEEPER_ROUNDS = 0.95, 2.0
"""A draft is believed to be almost as good as the one before it, which stays worth two of its own rounds."""
MEMORY = 0.95
"""What a round counts for after one more: the last 20 decide. More of them are late, fewer take luck for a trend."""
STALE = 2.0
"""Rounds that experience with the first draft is still worth once drafting was given up, so that a probe can tell."""
MORE, LESS = 1.01, 0.9
"""Another k is taken if it is 1 % faster. Drafting is given up late, below 0.9 of plain decoding, because it takes long
to come back to it; LOSS bounds what that costs."""
WORTH = 1.05
"""Where right drafts alone would be less than 5 % faster, nothing is drafted, and probes cost nothing."""
LOSS, SHARE = 2.0, 0.006
"""What drafting may lose in all: plain steps, and a share of the text. Together 1.4 % of 256 tokens."""
SHORTEST_WAIT, GROWTH, LONGEST_WAIT = 32.0, 0.25, 1024.0
"""Tokens before the next probe: a quarter of the plain text behind it, within these. Where drafting never pays, 4,096
tokens lose 0.4 %. Doubled waits would lose less, and find the easier second half of a text too late."""


@dataclass(frozen=True)
class Costs:
    """What a whole round with k drafts costs, k = 0 to k_max, in any unit: drafting, verifying, bookkeeping.

    rounds[0] is a plain step. `resume` comes on top where the round before was a plain step: the drafter has the tokens
    of all plain steps since the last drafts to take in. Raises ValueError where a cost is not finite and above 0
    (`resume` may be 0), or there is none.
    """

    rounds: tuple[float, ...]
    resume: float = 0.0

    def __post_init__(self) -> None:
        if not self.rounds or not all(0 < cost < math.inf for cost in self.rounds):
            raise ValueError(f"rounds must be finite costs above 0, that of a plain step first, not {self.rounds!r}")
        if not 0 <= self.resume < math.inf:
            raise ValueError(f"resume must be a finite cost, not {self.resume!r}")

    @property
    def k_max(self) -> int:
        return len(self.rounds) - 1


class DraftLength:
    """Chooses k for the rounds of one text, which take at most 0.6 % and 2 plain steps longer than plain decoding.

    That holds whatever the drafts are, if the costs are right: no round is chosen that would break the bound with all
    its drafts wrong. While plain decoding is best, a probe now and then finds out whether it still is.
    """

    def __init__(self, costs: Costs, *, start: int | None = None) -> None:
        """`start` is k of the first round; None takes what is best where a first draft is right 3 times in 4.

        Raises ValueError for a start that is not from 0 to k_max.
        """
        if start is not None and not 0 <= start <= costs.k_max:
            raise ValueError(f"start must be None or from 0 to k_max {costs.k_max}, not {start}")
        self._costs, self._resume = [cost / costs.rounds[0] for cost in costs.rounds], costs.resume / costs.rounds[0]
        self._can_pay = any(k + 1 > WORTH * self._costs[k] for k in range(1, costs.k_max + 1))
        self._right, self._tried = [0.0] * costs.k_max, [0.0] * costs.k_max
        self._may_lose = LOSS
        self._k, self._plain, self._wait, self._paused = 0, 0, 0.0, False
        if self._can_pay:
            self._right[0], self._tried[0] = PRIOR * PRIOR_ROUNDS, PRIOR_ROUNDS
            self._k = self._best() if start is None else start
            self._wait = max(1.0, (self._costs[1] + self._resume - 1 - PRIOR) / SHARE)

    def choose(self) -> int:
        """How many tokens to draft in the next round, 0 to k_max."""
        if not self._can_pay or (self._k == 0 and self._wait > 0):
            return 0
        k = self._k or 1
        while k and self._cost(k) - 1 > self._may_lose:
            k -= 1
        return k

    def observe(self, k: int, accepted: int) -> None:
        """A round with k drafts is over, and the first `accepted` of them were right.

        k need not be what was chosen. Raises ValueError for an `accepted` that is not from 0 to k, or a k above k_max.
        """
        if not 0 <= accepted <= k < len(self._costs):
            raise ValueError(f"accepted must be from 0 to k, and k to {len(self._costs) - 1}, not {accepted} and {k}")
        tokens, lost = accepted + 1, self._cost(k) - accepted - 1
        self._may_lose += SHARE * tokens - lost
        self._plain += tokens
        self._paused = k == 0
        if k == 0:
            self._wait -= 1
            return
        self._count(k, accepted)
        self._k = self._best()
        if self._k:
            self._plain = 0
        elif accepted == 0:  # after a promising probe comes another
            self._wait = min(LONGEST_WAIT, max(SHORTEST_WAIT, GROWTH * self._plain))
            stale = min(1.0, STALE / self._tried[0])
            self._right[0], self._tried[0] = self._right[0] * stale, self._tried[0] * stale

    def _cost(self, k: int) -> float:
        """Of the next round, with k drafts, in plain steps."""
        return self._costs[k] + (self._resume if k and self._paused else 0.0)

    def _count(self, k: int, accepted: int) -> None:
        for j in range(len(self._tried)):
            self._right[j] = MEMORY * self._right[j] + (j < accepted)
            self._tried[j] = MEMORY * self._tried[j] + (j < min(accepted + 1, k))

    def _rates(self) -> list[float]:
        """Tokens in the time of a plain step, for each k."""
        rates, expected, all_right, chance = [1.0], 1.0, 1.0, 0.0
        for j, (right, tried) in enumerate(zip(self._right, self._tried)):
            believed = DEEPER_ROUNDS if j else 0.0
            chance = (right + believed * DEEPER * chance) / (tried + believed)
            all_right *= chance
            expected += all_right
            rates.append(expected / self._costs[j + 1])
        return rates

    def _best(self) -> int:
        """The best k, or the k of now where that is nearly as good."""
        rates = self._rates()
        best, now = max(range(len(rates)), key=rates.__getitem__), rates[self._k]
        if best == 0:
            return self._k if now > LESS else 0
        return best if rates[best] > MORE * now else self._k
